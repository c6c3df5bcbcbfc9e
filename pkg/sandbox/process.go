package sandbox

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

const (
	// lostCode is the exit code of a process that ended with its machine.
	lostCode = 128 + int32(unix.SIGKILL)
	// unknownCode is the one of a process whose end the guest can't tell.
	unknownCode = 255
)

// ExecConfig is what Exec needs.
type ExecConfig struct {
	ID       string
	Process  *specs.Process
	Streams  agent.StreamSet
	Terminal bool
}

// A Process is the first process of a container or an exec'd one.
type Process struct {
	c        *Container
	execID   string
	want     agent.StreamSet
	terminal bool
	request  *protocol.ExecProcessRequest // of an exec'd process

	done chan struct{} // closed when it has ended

	mu      sync.Mutex
	status  Status           // guarded by mu
	doing   string           // guarded by mu: the operation that has claimed it
	size    *protocol.Box    // guarded by mu: of the terminal, before there is one
	exit    agent.ExitStatus // guarded by mu
	streams *agent.Streams   // guarded by mu
	stdout  io.Reader        // guarded by mu
}

func newProcess(c *Container, execID string, want agent.StreamSet) *Process {
	return &Process{c: c, execID: execID, want: want, status: Created, done: make(chan struct{})}
}

// Exec registers a process; Process.Start starts it. ErrAlreadyExists,
// ErrFailedPrecondition when the container does not run.
func (c *Container) Exec(ctx context.Context, cfg ExecConfig) (*Process, error) {
	p, err := c.exec(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("exec %q in container %q: %w", cfg.ID, c.id, err)
	}
	return p, nil
}

func (c *Container) exec(ctx context.Context, cfg ExecConfig) (*Process, error) {
	if cfg.ID == "" || cfg.Process == nil || len(cfg.Process.Args) == 0 {
		return nil, fmt.Errorf("process without an id or a command: %w", errdefs.ErrInvalidArgument)
	}
	if st := c.Status(); st != Running {
		return nil, refused("exec in", st)
	}
	spec := *cfg.Process
	spec.Terminal = spec.Terminal || cfg.Terminal
	if dropProcessLabels(&spec) {
		log.G(ctx).WithField("exec_id", cfg.ID).Warn("the guest does not get AppArmor and SELinux labels")
	}
	p := newProcess(c, cfg.ID, cfg.Streams)
	p.terminal = spec.Terminal
	p.request = &protocol.ExecProcessRequest{
		ContainerId: c.id, ExecId: cfg.ID, Process: wireProcess(&spec), NoStdin: !cfg.Streams.Stdin,
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// The first process has the container's id in the guest.
	if c.execs[cfg.ID] != nil || cfg.ID == c.id {
		return nil, errdefs.ErrAlreadyExists
	}
	c.execs[cfg.ID] = p
	return p, nil
}

// ExecID is empty for the first process.
func (p *Process) ExecID() string { return p.execID }

// guestID is the process' name in the guest.
func (p *Process) guestID() string {
	if p.execID == "" {
		return p.c.id
	}
	return p.execID
}

// Status never asks the guest.
func (p *Process) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

// claim takes the process for one operation, if it is in one of the states.
func (p *Process) claim(what string, in ...Status) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.doing != "" {
		return fmt.Errorf("another call is to %s it: %w", p.doing, errdefs.ErrFailedPrecondition)
	}
	if !slices.Contains(in, p.status) {
		return refused(what, p.status)
	}
	p.doing = what
	return nil
}

// release ends an operation, which led to a state: unless the process has
// ended in the meantime.
func (p *Process) release(to Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doing = ""
	if p.status.leads(to) {
		p.status = to
	}
}

// finish says how the process ended; the first word counts.
func (p *Process) finish(exit agent.ExitStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status == Stopped {
		return
	}
	p.status, p.exit = Stopped, exit
	close(p.done)
}

// lose ends a process with its machine. Whether the host's kernel killed that for
// lack of memory is told before, as if it had been the guest's.
func (p *Process) lose() {
	if p.c.Status() != Stopped && p.c.s.hostOOM() {
		p.c.countOOM()
		p.c.reportOOM()
	}
	p.finish(agent.ExitStatus{Code: lostCode, ExitedAt: time.Now()})
}

// Start runs an exec'd process.
func (p *Process) Start(ctx context.Context) error {
	if p.execID == "" {
		return p.c.Start(ctx)
	}
	if err := p.start(ctx); err != nil {
		return fmt.Errorf("start %q in container %q: %w", p.execID, p.c.id, err)
	}
	return nil
}

func (p *Process) start(ctx context.Context) (err error) {
	s := p.c.s
	ctx, leave, err := s.enter(ctx, &s.tasks)
	if err != nil {
		return err
	}
	defer leave()
	if err := p.claim("start", Created); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			p.release(Created)
		}
	}()
	if st := p.c.Status(); st != Running {
		return refused("exec in", st)
	}
	p.mu.Lock()
	if p.size != nil {
		p.request.Process.ConsoleSize = p.size
	}
	p.mu.Unlock()
	if err = p.c.guest().Exec(ctx, p.request); err == nil {
		var streams *agent.Streams
		if streams, err = p.c.guest().Streams(ctx, p.c.id, p.execID, p.want); err == nil {
			p.setStreams(ctx, streams)
		}
	}
	if err != nil {
		p.abandon(ctx)
		return s.because(err)
	}
	p.release(Running)
	p.watch(ctx)
	return nil
}

// abandon ends what a start that failed may have left in the guest: a call
// that was cancelled may have been carried out.
func (p *Process) abandon(ctx context.Context) {
	ctx, cancel := within(ctx, cleanupTimeout)
	defer cancel()
	a := p.c.guest()
	if a.SignalProcess(ctx, p.c.id, p.execID, uint32(unix.SIGKILL), false) == nil {
		_, _ = a.WaitProcess(ctx, p.c.id, p.execID)
	}
	a.ForgetProcess(p.c.id, p.execID)
}

// watch waits for the end of the process beside everything else.
func (p *Process) watch(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	p.c.s.jobs.Go(func() {
		exit, err := p.c.s.exitOf(ctx, p)
		if err != nil {
			exit = agent.ExitStatus{Code: unknownCode, ExitedAt: time.Now()}
			if p.c.s.alive() != nil {
				p.lose()
			} else if p.c.Status() != Stopped {
				log.G(ctx).WithError(err).Warn("how the process ended is not known")
			}
		}
		if exit.OOMKilled {
			p.c.reportOOM()
		}
		p.finish(exit)
		if p == p.c.init {
			p.c.ended(ctx)
		}
	})
}

// exitOf waits for the end of a process, over as many connections as it takes.
func (s *Sandbox) exitOf(ctx context.Context, p *Process) (exit agent.ExitStatus, err error) {
	for range lostCalls {
		exit, err = p.c.guest().WaitProcess(ctx, p.c.id, p.guestID())
		if err == nil || !s.servesAfter(ctx, err) {
			break
		}
	}
	return exit, err
}

// Kill delivers a signal to this process. ErrNotFound after exit.
func (p *Process) Kill(ctx context.Context, signal uint32) error {
	if p.execID == "" {
		return p.c.Kill(ctx, signal, false)
	}
	err := errEnded
	switch st := p.Status(); st {
	case Created:
		err = refused("kill", st)
	case Running, Paused:
		err = p.c.guest().SignalProcess(ctx, p.c.id, p.execID, signal, false)
		if err == nil {
			return nil
		}
		if p.Status() == Stopped {
			err = errEnded
		}
	case Stopped:
	}
	return fmt.Errorf("kill %q in container %q: %w", p.execID, p.c.id, err)
}

// Resize sets the terminal's size. Without a terminal there is nothing to do;
// for a process that is yet to start it is remembered.
func (p *Process) Resize(ctx context.Context, rows, columns uint32) error {
	if !p.terminal {
		return nil
	}
	p.mu.Lock()
	early := p.execID != "" && p.status == Created
	if early {
		p.size = &protocol.Box{Height: rows, Width: columns}
	}
	ended := p.status == Stopped
	p.mu.Unlock()
	if early || ended {
		return nil
	}
	if err := p.c.guest().WinsizeProcess(ctx, p.c.id, p.guestID(), rows, columns); err != nil {
		return fmt.Errorf("resize terminal of %q: %w", p.guestID(), p.c.s.because(err))
	}
	return nil
}

func (p *Process) setStreams(ctx context.Context, streams *agent.Streams) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.streams = streams
	if streams.Stdout == nil {
		return
	}
	p.stdout = streams.Stdout
	if p.execID == "" {
		ctx := context.WithoutCancel(ctx)
		p.stdout = &firstRead{r: streams.Stdout, mark: func() { p.c.s.state.mark(ctx, PhaseOutput, time.Now()) }}
	}
}

func (p *Process) closeStreams() error {
	p.mu.Lock()
	streams := p.streams
	p.mu.Unlock()
	if streams == nil {
		return nil
	}
	return streams.Close()
}

// Stdin is nil when it was not asked for. Its Close is the end of input.
func (p *Process) Stdin() io.WriteCloser {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.streams == nil || p.streams.Stdin == nil {
		return nil
	}
	return p.streams.Stdin
}

// Stdout ends with io.EOF when everything was read. Valid after
// CreateContainer for the first process and after Start for an exec'd one.
func (p *Process) Stdout() io.Reader {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stdout
}

// Stderr is as Stdout.
func (p *Process) Stderr() io.Reader {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.streams == nil || p.streams.Stderr == nil {
		return nil
	}
	return p.streams.Stderr
}

// Done is closed when the process has ended, or the machine has.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how. Valid after Done; a process that ended with its machine has
// code 137.
func (p *Process) Exit() agent.ExitStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// Delete forgets an exec'd process that is stopped or was never started.
func (p *Process) Delete(context.Context) error {
	if p.execID == "" {
		return fmt.Errorf("delete container %q as a process: %w", p.c.id, errdefs.ErrInvalidArgument)
	}
	if err := p.claim("delete", Created, Stopped); err != nil {
		return fmt.Errorf("delete %q in container %q: %w", p.execID, p.c.id, err)
	}
	p.c.mu.Lock()
	delete(p.c.execs, p.execID)
	p.c.mu.Unlock()
	p.c.guest().ForgetProcess(p.c.id, p.execID)
	return p.closeStreams()
}

// A firstRead says when the first bytes came.
type firstRead struct {
	r    io.Reader
	mark func()
	seen atomic.Bool
}

func (f *firstRead) Read(b []byte) (int, error) {
	n, err := f.r.Read(b)
	if n > 0 && !f.seen.Load() && !f.seen.Swap(true) {
		f.mark()
	}
	return n, err
}
