package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
func (c *container) discard(ctx context.Context) (err error) {
	for _, args := range [][]string{
		{"task", "delete", "--force", c.id}, {"container", "delete", c.id},
	} {
		out, rerr := c.r.Ctr(ctx, args...).CombinedOutput()
		// Debian's ctr ends with the container's exit code, 137.
		if rerr != nil && !strings.Contains(rerr.Error(), "137") {
			err = errors.Join(err, fmt.Errorf("ctr %q: %w: %s", args, rerr, out))
		}
	}
	return err
}

// A process is one that was exec'd, with its streams.
type process struct {
	c             *container
	id            string
	began         time.Time // when Exec was called
	stdin, stdout *os.File
	dir           string
	forget        func() bool // ends the watch over the context
}

// exec starts a process.
func (c *container) exec(ctx context.Context, args ...string) (_ *process, err error) {
	p := &process{c: c, id: fmt.Sprintf("e%d", c.execs.Add(1))}
	if p.dir, err = os.MkdirTemp(c.r.local.Dir, "io"); err != nil {
		return nil, err
	}
	in, out := filepath.Join(p.dir, "in"), filepath.Join(p.dir, "out")
	for path, f := range map[string]**os.File{in: &p.stdin, out: &p.stdout} {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return nil, err
		}
		// Both ends, so that opening waits for nobody.
		if *f, err = os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
			return nil, err
		}
	}
	spec, err := json.Marshal(specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		return nil, err
	}
	p.forget = context.AfterFunc(ctx, func() { // nobody waits for a stream for ever
		_, _ = p.stdin.SetDeadline(time.Unix(1, 0)), p.stdout.SetDeadline(time.Unix(1, 0))
	})
	p.began = time.Now()
	_, err = c.Exec(ctx, &task.ExecProcessRequest{
		ID: c.id, ExecID: p.id, Stdin: in, Stdout: out, Stderr: os.DevNull,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: spec},
	})
	if err != nil {
		return nil, err
	}
	_, err = c.Start(ctx, &task.StartRequest{ID: c.id, ExecID: p.id})
	return p, err
}

// end waits for the process and forgets it.
func (p *process) end(ctx context.Context) error {
	p.forget()
	w, err := p.c.Wait(ctx, &task.WaitRequest{ID: p.c.id, ExecID: p.id})
	if err == nil && w.ExitStatus != 0 {
		err = fmt.Errorf("%s ended with %d", p.id, w.ExitStatus)
	}
	_, derr := p.c.Delete(ctx, &task.DeleteRequest{ID: p.c.id, ExecID: p.id})
	return errors.Join(err, derr, p.stdin.Close(), p.stdout.Close(), os.RemoveAll(p.dir))
}
