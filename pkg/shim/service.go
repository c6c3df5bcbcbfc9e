package shim

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// A service is the task service of one sandbox.
type service struct {
	cmd     command
	opts    Options
	events  *publisher
	life    context.Context //nolint:containedctx // the service's own: ends creations when the daemon does
	endLife context.CancelFunc
	done    chan struct{} // closed by the Shutdown that ends the daemon

	calls   sync.WaitGroup // calls that change something; Add only while !closed
	running sync.WaitGroup // followers and watchers; Add only within calls

	mu         sync.Mutex
	closed     bool                  // guarded by mu
	self       record                // guarded by mu; of the sandbox
	box        *sandbox.Sandbox      // guarded by mu; nil before the first Create and after the stop
	pod        *podSandbox           // guarded by mu; nil without the sandbox API
	containers map[string]*container // guarded by mu; nil while being created
}

func newService(ctx context.Context, c command, opts Options, self record, p *publisher) *service {
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	return &service{
		cmd:        c,
		opts:       opts,
		self:       self,
		events:     p,
		life:       life,
		endLife:    cancel,
		done:       make(chan struct{}),
		containers: map[string]*container{},
	}
}

// container finds a container that has been created.
func (s *service) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

func (s *service) find(id, execID string) (*container, *process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(execID)
	return c, p, err
}

// begin says that a call changes something. Its context ends with the daemon,
// which waits for the function returned.
func (s *service) begin(ctx context.Context) (_ context.Context, end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, fmt.Errorf("shim is shutting down: %w", errdefs.ErrUnavailable)
	}
	s.calls.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() {
		stop()
		cancel()
		s.calls.Done()
	}, nil
}

// reserve takes an id for a container that is about to be created. The
// function returned puts the container there, or gives the id back for nil.
func (s *service) reserve(id string) (put func(*container), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.containers[id]; taken {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrAlreadyExists)
	}
	s.containers[id] = nil
	return func(c *container) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if c == nil {
			delete(s.containers, id)
		} else {
			s.containers[id] = c
		}
	}, nil
}

// remove forgets a container and says whether the sandbox is to go with it:
// it was the last one, or the one that stands for the pod.
func (s *service) remove(id string) (last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
	return s.pod == nil && (len(s.containers) == 0 || id == s.cmd.id)
}

// enter returns the sandbox for a container, made now if it is the first one;
// then the caller starts it. The record is for the container's bundle.
func (s *service) enter(cfg config.Config, id string, pod bool, files ...sandbox.File) (box *sandbox.Sandbox, rec record, first bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.box != nil {
		return s.box, s.self, false, nil
	}
	if id != s.cmd.id {
		return nil, rec, false, fmt.Errorf("sandbox %q does not run: %w", s.cmd.id, errdefs.ErrFailedPrecondition)
	}
	s.self.Dir = sandbox.Dir(cfg.StateDir, s.cmd.address, s.cmd.namespace, s.cmd.id)
	o := s.opts.Sandbox(cfg)
	o.ID = s.cmd.id
	o.Namespace = s.cmd.namespace
	o.Address = s.cmd.address
	o.Dir = s.self.Dir
	o.Began = s.cmd.began
	o.OnOOM = s.oom
	o.Pod, o.Files = pod, files
	if s.box, err = sandbox.New(o); err != nil {
		return nil, rec, false, err
	}
	return s.box, s.self, true, nil
}

// leave stops the sandbox and forgets it.
func (s *service) leave(ctx context.Context) error {
	s.mu.Lock()
	box := s.box
	s.mu.Unlock()
	if box == nil {
		return nil
	}
	err := box.Stop(ctx)
	s.mu.Lock()
	if s.box == box {
		s.box = nil
	}
	s.mu.Unlock()
	return err
}

// watch says why the machine is gone when nobody wanted it to be. The
// processes end by themselves.
func (s *service) watch(ctx context.Context, box *sandbox.Sandbox) {
	<-box.Done()
	if err := box.Err(); err != nil {
		log.G(ctx).WithError(err).Error("virtual machine is gone")
	}
}

// shutdown ends the daemon unless it has containers.
func (s *service) shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.containers {
		if c != nil {
			return
		}
	}
	if s.pod != nil {
		return // ShutdownSandbox ends it
	}
	if !s.closed {
		s.closed = true
		close(s.done)
	}
}

// close ends everything and joins every goroutine. Exits are published.
func (s *service) close(ctx context.Context) {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.endLife()
	s.calls.Wait()
	if err := s.leave(ctx); err != nil {
		log.G(ctx).WithError(err).Error("sandbox not stopped cleanly")
	}
	s.mu.Lock()
	left := s.containers
	s.containers = map[string]*container{}
	s.mu.Unlock()
	for _, c := range left {
		c.abandon(ctx)
	}
	s.running.Wait()
}
