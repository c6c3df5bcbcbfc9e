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

// transfers is how often each is made in a run: they are short, and differ by a fifth.
const transfers = 3

// stdio measures 20 MiB in each direction through a process' streams, against
// a raw vsock connection between the same two ends: the same process reads and
// writes it itself.
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
	for range r.runs * transfers {
		for _, m := range []struct {
			times *[]time.Duration
			f     func(context.Context) (time.Duration, error)
		}{
			{&rawOut, func(ctx context.Context) (time.Duration, error) { return raw(ctx, dial, rawSource) }},
			{&out, c.stdout},
			{&rawIn, func(ctx context.Context) (time.Duration, error) { return raw(ctx, dial, rawSink) }},
			{&in, c.stdin},
		} {
			t, err := limited(ctx, m.f)
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

// transferLimit bounds one transfer: what stands still is seen at once.
const transferLimit = 5 * time.Minute

func limited(ctx context.Context, transfer func(context.Context) (time.Duration, error)) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, transferLimit)
	defer cancel()
	return transfer(ctx)
}

func rate(times []time.Duration) float64 { return volume / (1 << 20) / (median(times) / 1000) }

// raw carries the volume over a connection of its own.
func raw(ctx context.Context, dial vsock.Dialer, direction byte) (t time.Duration, err error) {
	conn, err := dial(ctx, guestPort)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write([]byte{direction}); err != nil {
		return 0, err
	}
	if direction == rawSource {
		return take(conn)
	}
	return give(conn, conn, func() error { return nil })
}

// take is the time from the source's first byte to its last.
func take(r io.Reader) (time.Duration, error) {
	if err := drain(r, 1); err != nil {
		return 0, err
	}
	began := time.Now()
	err := drain(r, volume-1)
	return time.Since(began), err
}

// give is the time from when the sink runs until it has read everything, which it
// says.
func give(w io.Writer, r io.Reader, end func() error) (time.Duration, error) {
	if err := drain(r, len(sinkReady)); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := pour(w); err != nil {
		return 0, err
	}
	if err := end(); err != nil {
		return 0, err
	}
	want := fmt.Sprintf(sinkEnds, sinkReads)
	answer := make([]byte, len(want))
	_, err := io.ReadFull(r, answer)
	t := time.Since(began)
	if err == nil && string(answer) != want {
		err = fmt.Errorf("the process read %q, not %q", answer, want)
	}
	return t, err
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

func (c *container) stdout(ctx context.Context) (time.Duration, error) {
	p, err := c.exec(ctx, source...)
	if err != nil {
		return 0, err
	}
	t, err := take(p.stdout)
	return t, p.finish(ctx, err)
}

func (c *container) stdin(ctx context.Context) (time.Duration, error) {
	p, err := c.exec(ctx, sink...)
	if err != nil {
		return 0, err
	}
	t, err := give(p.stdin, p.stdout, func() error {
		_, err := c.CloseIO(ctx, &task.CloseIORequest{ID: c.id, ExecID: p.id, Stdin: true})
		return err
	})
	return t, p.finish(ctx, err)
}
