package shim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

const (
	// exitTimeout bounds how long an exit is held back for output that is still
	// on its way: a child that lives on keeps a stream open for ever.
	exitTimeout = time.Second
	// execsTimeout bounds how long the exit of a container is held back for
	// those of its exec'd processes, after they were killed.
	execsTimeout = 10 * time.Second
)

// A process is a process of the sandbox and what containerd knows of it.
type process struct {
	*sandbox.Process
	stdio stdio
	relay *relay
	// over is closed when nothing more happens to the process: its exit was
	// published, or it was never started and is deleted.
	over chan struct{}
	once sync.Once

	// deleting has room for the one that deletes.
	deleting chan struct{}

	// started is made by the first start of an exec'd process, and of the first
	// process by its container's; closed when the start has been published or
	// has failed. Guarded by the container's mu.
	started chan struct{}
}

func newProcess(p *sandbox.Process, s stdio, r *relay) *process {
	return &process{
		Process:  p,
		stdio:    s,
		relay:    r,
		over:     make(chan struct{}),
		deleting: make(chan struct{}, 1),
	}
}

func (p *process) finish() { p.once.Do(func() { close(p.over) }) }

// A container is a container of the sandbox and its processes.
type container struct {
	*sandbox.Container
	init *process

	mu       sync.Mutex
	ended    bool                // the first process has; guarded by mu
	heard    bool                // its start was published; guarded by mu
	oomEarly bool                // an OOM kill was seen before that; guarded by mu
	execs    map[string]*process // guarded by mu
}

func newContainer(c *sandbox.Container, init *process) *container {
	return &container{Container: c, init: init, execs: map[string]*process{}}
}

// process finds an exec'd process, or the first one for the empty id.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[execID]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %q of container %q: %w", execID, c.ID(), errdefs.ErrNotFound)
}

func (c *container) add(p *process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.execs[p.ExecID()] = p
}

func (c *container) drop(execID string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, execID)
}

// beginStart says that p is about to start. Its exit, and that of the
// container, are not published before the function returned is called.
func (c *container) beginStart(p *process) (started func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil, fmt.Errorf("container %q does not run: %w", c.ID(), errdefs.ErrFailedPrecondition)
	}
	if p.started != nil {
		return nil, fmt.Errorf("process %q of container %q was started before: %w",
			p.ExecID(), c.ID(), errdefs.ErrFailedPrecondition)
	}
	ch := make(chan struct{})
	p.started = ch
	return func() { close(ch) }, nil
}

// awaitStart waits for a start that is going on, and says whether there was one.
func (c *container) awaitStart(ctx context.Context, p *process) bool {
	c.mu.Lock()
	ch := p.started
	c.mu.Unlock()
	if ch == nil {
		return false
	}
	select {
	case <-ch:
	case <-ctx.Done():
	}
	return true
}

// sawOOM says whether an OOM kill may be published now. Otherwise hearing does it.
func (c *container) sawOOM() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.oomEarly = !c.heard
	return c.heard
}

// hear says that the start was published, or never will be, and whether an OOM
// kill is to be published behind it.
func (c *container) hear() (oom bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = true
	oom, c.oomEarly = c.oomEarly, false
	return oom
}

// end forbids further starts and returns the exec'd processes that were started.
func (c *container) end() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	var ps []*process
	for _, p := range c.execs {
		if p.started != nil {
			ps = append(ps, p)
		}
	}
	return ps
}

// abandon frees what belongs to a container whose processes are gone, after
// their exits were published.
func (c *container) abandon(ctx context.Context) {
	c.mu.Lock()
	ps := append(slices.Collect(maps.Values(c.execs)), c.init)
	c.mu.Unlock()
	for _, p := range ps {
		c.release(ctx, p)
	}
}

// release frees what belongs to a process that is gone or was never started,
// after its exit was published.
func (c *container) release(ctx context.Context, p *process) {
	if c.awaitStart(ctx, p) || p == c.init { // then it is followed
		select {
		case <-p.Done():
			<-p.over
		default:
		}
	}
	p.finish()
	p.relay.close(ctx)
}

// ready waits until a process can be deleted: it was never started, or has
// ended and its output was delivered.
func (p *process) ready(ctx context.Context) error {
	switch p.Status() {
	case sandbox.Created:
		return nil
	case sandbox.Stopped:
	default:
		return fmt.Errorf("still running: %w", errdefs.ErrFailedPrecondition)
	}
	select {
	case <-p.over:
	case <-ctx.Done():
		return ctx.Err()
	}
	p.relay.deliver(ctx)
	return nil
}

// follow waits for the end of a process and publishes it: after its output
// and after its start, and after the ends of all other processes when it is the
// container's first one.
func (s *service) follow(ctx context.Context, c *container, p *process) {
	defer p.finish()
	select {
	case <-p.Done():
	case <-p.over:
		return
	}
	p.relay.endInput()
	p.relay.settle(ctx, exitTimeout)
	if p == c.init {
		s.endExecs(ctx, c)
	}
	c.awaitStart(ctx, p)
	id := p.ExecID()
	if id == "" {
		id = c.ID()
		s.hear(ctx, c)
	}
	exit := p.Exit()
	s.events.publish(ctx, &events.TaskExit{
		ContainerID: c.ID(),
		ID:          id,
		Pid:         uint32(c.PID()),
		ExitStatus:  uint32(exit.Code),
		ExitedAt:    timestamppb.New(exit.ExitedAt),
	})
}

// oom publishes an OOM kill: behind the container's start, before its exit.
func (s *service) oom(id string) {
	if c, err := s.container(id); err == nil && !c.sawOOM() {
		return
	}
	s.events.publish(s.life, &events.TaskOOM{ContainerID: id})
}

// hear publishes what had to wait for the container's start.
func (s *service) hear(ctx context.Context, c *container) {
	if c.hear() {
		s.events.publish(ctx, &events.TaskOOM{ContainerID: c.ID()})
	}
}

// endExecs kills what the container's first process left and waits until its
// exits are published. Without a pid namespace of its own they live on.
func (s *service) endExecs(ctx context.Context, c *container) {
	ctx, cancel := context.WithTimeout(ctx, execsTimeout)
	defer cancel()
	for _, p := range c.end() {
		c.awaitStart(ctx, p)
		if p.Status() != sandbox.Stopped {
			if err := p.Kill(ctx, uint32(unix.SIGKILL)); err != nil && !errdefs.IsNotFound(err) {
				log.G(ctx).WithError(err).WithField("exec_id", p.ExecID()).Warn("process left by its container not killed")
			}
		}
		select {
		case <-p.over:
		case <-ctx.Done():
			log.G(ctx).WithField("exec_id", p.ExecID()).Warn("process still there after its container has ended")
		}
	}
}
