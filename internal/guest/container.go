package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/cleanup"
)

// A state is where a container is in its life.
type state int

const (
	creating state = iota
	created
	running
	paused
	stopped // its first process has ended
	removed
)

func (s state) String() string {
	return [...]string{"being created", "created", "running", "paused", "stopped", "removed"}[s]
}

// next lists where a container can go from each state.
var next = map[state][]state{
	creating: {created, stopped, removed},
	created:  {running, stopped},
	running:  {paused, stopped},
	paused:   {running, stopped},
	stopped:  {removed},
}

// A container and its processes. The op lock serialises what changes it; mu is
// for the fields below it and never held across I/O.
type container struct {
	id      string
	group   cgroup
	oom     *oomCounter
	sandbox *sandbox

	op     lock
	lib    *libcontainer.Container // guarded by op
	ownPID bool                    // has a pid namespace of its own; set once, before created
	undo   cleanup.Stack           // what create did; guarded by op
	wanted cpuset                  // guarded by op
	hooks  configs.Hooks           // those that libcontainer does not run; set once, before created
	about  about                   // set once, before created

	mu      sync.Mutex
	state   state                 // guarded by mu
	doomed  bool                  // killed, or being removed: nothing starts any more; guarded by mu
	init    *process              // guarded by mu
	procs   map[string]*process   // by exec id; guarded by mu
	streams map[net.Conn]struct{} // guarded by mu; nil: no new ones

	jobs    sync.WaitGroup // operations
	reapers sync.WaitGroup // one for each process
	conns   sync.WaitGroup // stream connections
}

func newContainer(s *sandbox, id string) *container {
	group := containerCgroup(id)
	return &container{
		id: id, group: group, sandbox: s, op: newLock(),
		oom:   &oomCounter{id: id, group: group, events: s.oom},
		procs: map[string]*process{}, streams: map[net.Conn]struct{}{},
	}
}

func (c *container) current() state {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// to changes the state. It fails when that is not possible any more.
func (c *container) to(s state) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.toLocked(s)
}

func (c *container) toLocked(s state) error {
	if !slices.Contains(next[c.state], s) {
		return precondition("container %q is %s", c.id, c.state)
	}
	c.state = s
	return nil
}

// do runs an operation under the op lock. The operation may hang on a dead file
// system, so it has a goroutine of its own; when ctx ends first the caller gets
// that error at once, and undo is called if the operation succeeds after all.
func (c *container) do(ctx context.Context, operation func() error, undo func()) error {
	if err := c.op.acquire(ctx); err != nil {
		return err
	}
	if err := c.begin(); err != nil {
		c.op.release()
		return err
	}
	var (
		mu        sync.Mutex
		abandoned bool
		done      = make(chan error, 1)
	)
	go func() {
		defer c.jobs.Done()
		defer c.op.release()
		err := operation()
		mu.Lock()
		left := abandoned
		done <- err
		mu.Unlock()
		if left && err == nil && undo != nil {
			undo()
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	mu.Lock()
	defer mu.Unlock()
	select {
	case err := <-done:
		return err
	default:
		abandoned = true
		return fmt.Errorf("container %q: %w", c.id, ctx.Err())
	}
}

// begin counts an operation, unless the container is gone. The caller holds the
// op lock.
func (c *container) begin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == removed {
		return notFound("container %q", c.id)
	}
	c.jobs.Add(1)
	return nil
}

// process finds one by its exec id; the first one is also called "" and by the
// container's id.
func (c *container) process(execID string) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == creating {
		return nil, precondition("container %q is %s", c.id, c.state)
	}
	if c.init != nil && (execID == "" || execID == c.id) {
		execID = c.init.id
	}
	if p := c.procs[execID]; p != nil {
		return p, nil
	}
	return nil, notFound("process %q of container %q", execID, c.id)
}

// live is process for those who must not see one that was waited for.
func (c *container) live(execID string) (*process, error) {
	p, err := c.process(execID)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.waited {
		return nil, notFound("process %q of container %q", p.id, c.id)
	}
	return p, nil
}

// reserve takes a name for a process that is about to start.
func (c *container) reserve(execID string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.doomed:
		return precondition("container %q is being stopped", c.id)
	case c.state != created && c.state != running:
		return precondition("container %q is %s", c.id, c.state)
	case execID == c.id:
		return fmt.Errorf("process %q of container %q: %w", execID, c.id, errdefs.ErrAlreadyExists)
	}
	if p := c.procs[execID]; p != nil && !p.waited {
		return fmt.Errorf("process %q of container %q: %w", execID, c.id, errdefs.ErrAlreadyExists)
	}
	return nil
}

// adopt takes a process that libcontainer has started: it can be found, and it
// will be reaped.
func (c *container) adopt(p *process) error {
	if err := p.track(); err != nil {
		return err
	}
	c.mu.Lock()
	if old := c.procs[p.id]; old != nil {
		defer old.io.close()
	}
	c.procs[p.id] = p
	if p.init {
		c.init = p
	}
	c.mu.Unlock()
	c.reapers.Go(func() { c.reap(p) })
	return nil
}

// reap waits for a process, tells whether it met the OOM killer, and ends what
// must not outlive it.
func (c *container) reap(p *process) {
	e := p.wait()
	e.oomKilled = c.oom.check()
	if p.init {
		c.mu.Lock()
		_ = c.toLocked(stopped)
		c.mu.Unlock()
		if !c.ownPID {
			// The kernel does this only for a pid namespace of its own.
			_ = c.group.kill()
		}
	}
	p.finish(e)
}

// waited notes that a WaitProcess has completed. From then on the process is
// gone, but what somebody still reads stays readable to its end.
func (c *container) waited(p *process) {
	c.mu.Lock()
	p.waited = true
	c.mu.Unlock()
	for _, o := range []*output{p.io.out, p.io.err} {
		if o != nil && !o.isClaimed() {
			o.close()
		}
	}
	c.forget(p)
}

// forget drops a process that was waited for and whose output was read.
func (c *container) forget(p *process) {
	for _, o := range []*output{p.io.out, p.io.err} {
		if o != nil && !o.isClosed() {
			return
		}
	}
	c.mu.Lock()
	gone := p.waited
	if gone && c.procs[p.id] == p {
		delete(c.procs, p.id)
	}
	c.mu.Unlock()
	if gone {
		p.io.close()
	}
}

// kill ends every process of the container, whatever else is going on, and keeps
// new ones from starting.
func (c *container) kill() error {
	c.mu.Lock()
	c.doomed = true
	c.mu.Unlock()
	return c.group.kill()
}

// isDoomed says whether what has just started must end.
func (c *container) isDoomed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.doomed
}

// remove ends the container and takes away all that create made.
func (c *container) remove(ctx context.Context) error {
	if err := c.kill(); err != nil {
		return fmt.Errorf("kill container %q: %w", c.id, err)
	}
	err := c.do(ctx, func() error {
		// Again: something may have been starting.
		if err := c.kill(); err != nil {
			return fmt.Errorf("kill container %q: %w", c.id, err)
		}
		c.reapers.Wait()
		c.closeStreams(ctx)
		err := c.undo.Run()
		c.discard()
		if err != nil {
			return fmt.Errorf("clean up container %q: %w", c.id, err)
		}
		return nil
	}, nil)
	if c.current() == removed { // and so no operation begins any more
		waitFor(ctx, &c.jobs)
	}
	return err
}

// discard takes the container out of the sandbox.
func (c *container) discard() {
	c.mu.Lock()
	c.state = removed
	c.mu.Unlock()
	c.sandbox.forget(c)
}

// notRunning turns what a signal finds into the class of the error.
func notRunning(p *process, err error) error {
	if errors.Is(err, unix.ESRCH) {
		return notFound("process %q has ended", p.id)
	}
	return err
}
