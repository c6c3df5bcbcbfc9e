package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmshim/vmshim/test/ociimage"
)

// A container is a running container, talked to through its shim's own socket: what
// ctr and containerd add would hide the differences.
type container struct {
	id     string
	r      *rig
	client *ttrpc.Client
	task.TTRPCTaskService
	execs atomic.Int64
}

func (r *rig) launch(ctx context.Context, runtime string, flags ...string) (*container, error) {
	c := &container{id: r.id(), r: r}
	args := append([]string{"run", "--detach", "--runtime", runtime}, flags...)
	if out, err := r.Ctr(ctx, append(args, ociimage.Name, c.id, "sleep", "100000")...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ctr run: %w: %s", err, out)
	}
	address, err := os.ReadFile(filepath.Join(r.Bundle(c.id), "address"))
	if err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(string(address), "unix://"))
	if err != nil {
		return nil, err
	}
	c.client = ttrpc.NewClient(conn)
	c.TTRPCTaskService = task.NewTTRPCTaskClient(c.client)
	return c, nil
}

func (c *container) remove(ctx context.Context) error {
	return errors.Join(c.client.Close(), c.discard(context.WithoutCancel(ctx)))
}

// discard kills and deletes the container.
func (c *container) discard(ctx context.Context) error {
	return errors.Join(c.r.do(ctx, "task", "delete", "--force", c.id), c.r.do(ctx, "container", "delete", c.id))
}

// do runs ctr to delete something.
func (r *rig) do(ctx context.Context, args ...string) error {
	out, err := r.Ctr(ctx, args...).CombinedOutput()
	// Debian's ctr ends with the container's exit code, 137.
	if err != nil && !strings.Contains(err.Error(), "137") {
		return fmt.Errorf("ctr %q: %w: %s", args, err, out)
	}
	return nil
}

// A process is one that was exec'd, with its streams. When it has ended, reading
// its stdout ends behind what it wrote, and writing to its stdin fails.
type process struct {
	c             *container
	id            string
	began         time.Time // when Exec was called
	stdin, stdout *os.File
	dir           string
	forget        func() bool // ends the watch over the context

	ended  chan struct{} // closed when status and err are set
	status uint32
	err    error
}

// exec starts a process.
func (c *container) exec(ctx context.Context, args ...string) (_ *process, err error) {
	p := &process{c: c, id: fmt.Sprintf("e%d", c.execs.Add(1)), ended: make(chan struct{})}
	if p.dir, err = os.MkdirTemp(c.r.local.Dir, "io"); err != nil {
		return nil, err
	}
	in, out := filepath.Join(p.dir, "in"), filepath.Join(p.dir, "out")
	if err := errors.Join(unix.Mkfifo(in, 0o600), unix.Mkfifo(out, 0o600), os.WriteFile(p.stderr(), nil, 0o600)); err != nil {
		return nil, err
	}
	// Both ends, so that opening waits for nobody.
	if p.stdin, err = os.OpenFile(in, os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	if p.stdout, err = os.OpenFile(out, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, err
	}
	// The writing end of stdout is held until the process has ended: the runtime
	// may open its own late.
	hold, err := os.OpenFile(out, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	spec, err := json.Marshal(specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		return nil, errors.Join(err, hold.Close())
	}
	p.forget = context.AfterFunc(ctx, func() { // nobody waits for a stream for ever
		_, _ = p.stdin.SetDeadline(time.Unix(1, 0)), p.stdout.SetDeadline(time.Unix(1, 0))
	})
	p.began = time.Now()
	_, err = c.Exec(ctx, &task.ExecProcessRequest{
		ID: c.id, ExecID: p.id, Stdin: in, Stdout: out, Stderr: p.stderr(),
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: spec},
	})
	if err != nil {
		return nil, errors.Join(err, hold.Close())
	}
	if _, err = c.Start(ctx, &task.StartRequest{ID: c.id, ExecID: p.id}); err != nil {
		return nil, errors.Join(err, hold.Close())
	}
	go p.watch(ctx, hold)
	return p, nil
}

func (p *process) stderr() string { return filepath.Join(p.dir, "err") }

// watch waits for the process, and ends its streams.
func (p *process) watch(ctx context.Context, hold *os.File) {
	defer close(p.ended)
	w, err := p.c.Wait(ctx, &task.WaitRequest{ID: p.c.id, ExecID: p.id})
	p.status, p.err = w.GetExitStatus(), err
	_, _ = hold.Close(), p.stdin.SetDeadline(time.Unix(1, 0))
}

// end waits for the process and forgets it.
func (p *process) end(ctx context.Context) error {
	<-p.ended
	p.forget()
	err := p.err
	if err == nil && p.status != 0 {
		said, _ := os.ReadFile(p.stderr())
		err = fmt.Errorf("%s ended with %d: %s", p.id, p.status, said)
	}
	_, derr := p.c.Delete(ctx, &task.DeleteRequest{ID: p.c.id, ExecID: p.id})
	return errors.Join(err, derr, p.stdin.Close(), p.stdout.Close(), os.RemoveAll(p.dir))
}

// finish is end after a stream that failed with err, or did not. The process is not
// waited for where err does not say that it has ended.
func (p *process) finish(ctx context.Context, err error) error {
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return errors.Join(err, p.end(ctx))
}

// says reads what the process says, and fails with why it ended when that is
// less than n bytes.
func (p *process) says(ctx context.Context, n int) error {
	err := drain(p.stdout, n)
	if errors.Is(err, io.EOF) {
		err = errors.Join(fmt.Errorf("%s said less than %d bytes", p.id, n), p.end(ctx))
	}
	return err
}
