package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"

	"github.com/vmshim/vmshim/pkg/vsock"
)

// stdio measures 20 MiB in each direction through a process' streams, against
// a raw vsock connection between the same two ends.
func (r *rig) stdio(ctx context.Context, res *results) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c, err := r.launch(ctx, machineRuntime, "--mount", "type=bind,src="+self+",dst=/bench,options=rbind:ro")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	server, err := c.exec(ctx, "/bench", guestCommand, actRaw)
	if err != nil {
		return err
	}
	if err := server.says(ctx, len("listening\n")); err != nil {
		return err
	}
	st, err := r.state(c.id)
	if err != nil {
		return err
	}
	dial, _, err := vsock.Parse(st.Agent)
	if err != nil {
		return err
	}
	var rawOut, rawIn, out, in []time.Duration
	for range r.runs {
		for _, m := range []struct {
			times *[]time.Duration
			f     func(context.Context) (time.Duration, error)
		}{
			{&rawOut, func(ctx context.Context) (time.Duration, error) { return raw(ctx, dial, 'r') }},
			{&out, c.stdout},
			{&rawIn, func(ctx context.Context) (time.Duration, error) { return raw(ctx, dial, 'w') }},
			{&in, c.stdin},
		} {
			t, err := m.f(ctx)
			if err != nil {
				return err
			}
			*m.times = append(*m.times, t)
		}
	}
	for _, d := range []struct {
		name       string
		raw, stdio []time.Duration
	}{{"guest to host", rawOut, out}, {"host to guest", rawIn, in}} {
		base := "raw vsock, 20 MiB " + d.name
		res.add(result{Name: base, Value: rate(d.raw), Unit: "MiB/s"})
		res.add(result{Name: "stdio, 20 MiB " + d.name, Value: rate(d.stdio), Unit: "MiB/s", Against: base, AtLeast: 0.5})
	}
	return r.ways(ctx, res, c)
}

func rate(times []time.Duration) float64 { return volume / (1 << 20) / (median(times) / 1000) }

// raw carries the volume over a connection of its own.
func raw(ctx context.Context, dial vsock.Dialer, direction byte) (time.Duration, error) {
	conn, err := dial(ctx, guestPort)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	began := time.Now()
	if _, err := conn.Write([]byte{direction}); err != nil {
		return 0, err
	}
	if direction == 'w' {
		if err := pour(conn); err != nil {
			return 0, err
		}
		err = drain(conn, 1)
	} else {
		err = drain(conn, volume+1)
	}
	return time.Since(began), err
}

// drain reads n bytes, as a reader of a stream does: a buffer at a time.
func drain(r io.Reader, n int) error {
	buf := make([]byte, 64<<10)
	for n > 0 {
		m, err := r.Read(buf[:min(n, len(buf))])
		if err != nil {
			return err
		}
		n -= m
	}
	return nil
}

// stdout is the time from a process' first byte to its last.
func (c *container) stdout(ctx context.Context) (time.Duration, error) {
	p, err := c.exec(ctx, source...)
	if err != nil {
		return 0, err
	}
	if err := p.says(ctx, 1); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := p.says(ctx, volume-1); err != nil {
		return 0, err
	}
	t := time.Since(began)
	return t, p.end(ctx)
}

// stdin is the time from when a process runs until it has read everything, which it says.
func (c *container) stdin(ctx context.Context) (time.Duration, error) {
	p, err := c.exec(ctx, sink...)
	if err != nil {
		return 0, err
	}
	if err := p.says(ctx, len("ready\n")); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := pour(p.stdin); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) { // the process has ended, or nobody waits for it
			err = errors.Join(err, p.end(ctx))
		}
		return 0, err
	}
	if _, err := c.CloseIO(ctx, &task.CloseIORequest{ID: c.id, ExecID: p.id, Stdin: true}); err != nil {
		return 0, err
	}
	want := fmt.Sprintf("%d+0 records in\n", volume>>16)
	answer := make([]byte, len(want))
	_, err = io.ReadFull(p.stdout, answer)
	t := time.Since(began)
	if err == nil && string(answer) != want {
		err = fmt.Errorf("the process read %q, not %q", answer, want)
	}
	return t, errors.Join(err, p.end(ctx))
}
