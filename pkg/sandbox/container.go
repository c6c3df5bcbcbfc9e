package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const (
	// pidsTimeout is how long Pids waits for the guest.
	pidsTimeout = 800 * time.Millisecond
	// statsTimeout bounds the snapshot that is taken when a container ended.
	statsTimeout = 2 * time.Second
	// killTimeout is how long a guest has for a SIGKILL to its only container.
	killTimeout = 10 * time.Second
)

// A Container is one container of a sandbox.
type Container struct {
	s          *Sandbox
	id, bundle string
	spec       *specs.Spec // the host's, for hooks
	init       *Process

	// Written by CreateContainer, before anybody else has the Container.
	root    string                           // on the host
	request *protocol.CreateContainerRequest // until it was sent
	pid     int
	hooked  bool
	pause   *standIn      // nil, but for the container that stands for a pod
	undo    cleanup.Stack // for remove

	removal sync.Once
	oom     sync.Once
	final   chan struct{} // closed when the last statistics were taken

	mu    sync.Mutex
	execs map[string]*Process              // guarded by mu
	pids  []*extension.ProcessInfo         // guarded by mu: the last known
	stats *protocol.StatsContainerResponse // guarded by mu: the last known
}

func newContainer(s *Sandbox, cfg ContainerConfig) *Container {
	c := &Container{
		s: s, id: cfg.ID, bundle: cfg.Bundle, spec: cfg.Spec,
		final: make(chan struct{}),
		execs: map[string]*Process{},
	}
	c.init = newProcess(c, "", cfg.Streams)
	c.init.terminal = cfg.Terminal || cfg.Spec.Process.Terminal
	if cfg.Pause {
		c.pause = newStandIn(func() uint32 { return uint32(c.pid) }, c.init.done)
	}
	return c
}

// guest is who has the container.
func (c *Container) guest() containerGuest {
	if c.pause != nil {
		return c.pause
	}
	return c.s.agent
}

// ID is the container's id.
func (c *Container) ID() string { return c.id }

// Bundle is the directory containerd gave.
func (c *Container) Bundle() string { return c.bundle }

// PID is the task pid: a process of the host in the container's network
// namespace, rooted in its root file system.
func (c *Container) PID() int { return c.pid }

// Status never asks the guest.
func (c *Container) Status() Status { return c.init.Status() }

// Init is the first process.
func (c *Container) Init() *Process { return c.init }

// Process finds an exec'd process, or Init for the empty id; ErrNotFound.
func (c *Container) Process(execID string) (*Process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[execID]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %q of container %q: %w", execID, c.id, errdefs.ErrNotFound)
}

// all are the container's processes, the first one last.
func (c *Container) all() []*Process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append(slices.Collect(maps.Values(c.execs)), c.init)
}

// Start runs the first process and the poststart hooks.
func (c *Container) Start(ctx context.Context) error {
	if err := c.start(ctx); err != nil {
		return fmt.Errorf("start container %q: %w", c.id, err)
	}
	c.s.state.mark(ctx, PhaseStarted, time.Now())
	if h := c.spec.Hooks; h != nil {
		tryHooks(ctx, "poststart", h.Poststart, c.hookState(specs.StateRunning, c.pid), c.s.opts.Config.HookTimeout)
	}
	return nil
}

func (c *Container) start(ctx context.Context) error {
	if err := c.init.claim("start", Created); err != nil {
		return err
	}
	err := c.guest().StartContainer(ctx, c.id)
	if err != nil {
		c.init.release(Created)
		return c.s.because(err)
	}
	c.init.release(Running)
	return nil
}

func (c *Container) hookState(status specs.ContainerState, pid int) *specs.State {
	return hookState(c.spec, c.id, c.bundle, status, pid)
}

// Kill delivers a signal to the first process, or to all. It waits for no
// other call. ErrNotFound after exit.
func (c *Container) Kill(ctx context.Context, signal uint32, all bool) error {
	if c.Status() == Stopped {
		return fmt.Errorf("kill container %q: %w", c.id, errEnded)
	}
	if signal == uint32(unix.SIGKILL) {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, killTimeout)
		defer cancel()
	}
	err := c.guest().SignalProcess(ctx, c.id, c.id, signal, all)
	switch {
	case err == nil:
		return nil
	case c.Status() == Stopped:
		return fmt.Errorf("kill container %q: %w", c.id, errEnded)
	case errors.Is(err, context.DeadlineExceeded) && signal == uint32(unix.SIGKILL) && c.s.hopeless(ctx):
		c.s.abort(ctx, fmt.Errorf("guest did not kill its container %q within %v", c.id, killTimeout))
		return nil
	}
	return fmt.Errorf("kill container %q: %w", c.id, err)
}

// hopeless says of a guest that did not kill a container in time whether its
// machine is to end for it: there is nothing else in it, so that its end is what
// was asked for, or it does not answer at all.
func (s *Sandbox) hopeless(ctx context.Context) bool {
	containers := 0
	for _, c := range s.created() {
		if c.pause == nil {
			containers++
		}
	}
	if containers <= 1 {
		return true
	}
	ctx, cancel := within(ctx, probeTimeout)
	defer cancel()
	return s.agent.Check(ctx) != nil
}

// errEnded is the answer to a signal for what has ended.
var errEnded = fmt.Errorf("process has ended: %w", errdefs.ErrNotFound)

// Pause freezes the container.
func (c *Container) Pause(ctx context.Context) error {
	return c.toggle(ctx, "pause", Running, Paused, c.guest().PauseContainer)
}

// Resume thaws it.
func (c *Container) Resume(ctx context.Context) error {
	return c.toggle(ctx, "resume", Paused, Running, c.guest().ResumeContainer)
}

func (c *Container) toggle(ctx context.Context, what string, from, to Status, do func(context.Context, string) error) error {
	err := c.init.claim(what, from)
	if err == nil {
		if err = do(ctx, c.id); err != nil {
			to, err = from, c.s.because(err)
		}
		c.init.release(to)
	}
	if err != nil {
		return fmt.Errorf("%s container %q: %w", what, c.id, err)
	}
	return nil
}

// Update changes the resources of a container that was created.
func (c *Container) Update(ctx context.Context, resources *specs.LinuxResources) error {
	if st := c.Status(); st == Stopped {
		return fmt.Errorf("update container %q: %w", c.id, refused("update", st))
	}
	if resources == nil {
		return fmt.Errorf("update container %q: no resources: %w", c.id, errdefs.ErrInvalidArgument)
	}
	if c.pause != nil {
		return nil // nothing is limited by it
	}
	guest, notes := guestResources(resources)
	if len(notes) > 0 {
		log.G(ctx).WithField("left_out", notes).Warn("the guest does not get all that the update names")
	}
	// Room comes before the limit that lets it be used, and goes after the one
	// that keeps it free.
	c.s.raiseLimits(c.id, resources)
	c.s.fit(ctx)
	if err := c.guest().UpdateContainer(ctx, c.id, wireResources(guest)); err != nil {
		return fmt.Errorf("update container %q: %w", c.id, c.s.because(err))
	}
	c.s.replaceLimits(c.id, resources)
	c.s.fit(ctx)
	return nil
}

// Stats asks the guest; after exit it is the last snapshot, taken when the
// container ended.
func (c *Container) Stats(ctx context.Context) (*protocol.StatsContainerResponse, error) {
	var err error
	select {
	case <-c.init.done:
		err = await(ctx, c.final)
	default:
		err = c.askStats(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stats != nil && (err == nil || c.Status() == Stopped) {
		return c.stats, nil
	}
	if err == nil {
		err = fmt.Errorf("it ended before there were any: %w", errdefs.ErrUnavailable)
	}
	return nil, fmt.Errorf("statistics of container %q: %w", c.id, err)
}

func (c *Container) askStats(ctx context.Context) error {
	stats, err := c.guest().StatsContainer(ctx, c.id)
	if err != nil {
		return c.s.because(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats = stats
	return nil
}

// ended takes the last statistics, before the guest forgets the container.
func (c *Container) ended(ctx context.Context) {
	defer close(c.final)
	ctx, cancel := within(ctx, statsTimeout)
	defer cancel()
	if err := c.askStats(ctx); err != nil && c.s.alive() == nil {
		log.G(ctx).WithError(err).WithField("container_id", c.id).Debug("no last statistics")
	}
}

// countOOM has the last statistics say that there was a kill.
func (c *Container) countOOM() {
	c.mu.Lock()
	defer c.mu.Unlock()
	stats := &protocol.StatsContainerResponse{}
	if c.stats != nil {
		stats = proto.CloneOf(c.stats)
	}
	if stats.CgroupStats == nil {
		stats.CgroupStats = &protocol.CgroupStats{}
	}
	events := maps.Clone(stats.CgroupStats.MemoryEvents)
	if events == nil {
		events = map[string]uint64{}
	}
	events["oom_kill"] = max(1, events["oom_kill"])
	stats.CgroupStats.MemoryEvents = events
	c.stats = stats
}

// Pids lists the guest's processes. It answers within a second whatever the
// guest does, and is never empty nor an error before Delete: the last known
// list, or the task pid, stands in.
func (c *Container) Pids(ctx context.Context) ([]*extension.ProcessInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, pidsTimeout)
	defer cancel()
	var pids []*extension.ProcessInfo
	if c.Status() != Stopped {
		var err error
		if pids, err = c.guest().Pids(ctx, c.id); err != nil {
			log.G(ctx).WithError(err).WithField("container_id", c.id).Debug("pids are the last known")
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(pids) > 0 {
		c.pids = pids
	}
	if len(c.pids) > 0 {
		return slices.Clone(c.pids), nil
	}
	return []*extension.ProcessInfo{{Pid: uint32(c.pid), ExecId: c.id}}, nil
}

// reportOOM reports once that the guest's kernel killed something. Whoever
// comes second waits until that is done, so that no exit overtakes it.
func (c *Container) reportOOM() { c.oom.Do(func() { c.s.opts.OnOOM(c.id) }) }

// lost ends every process: the machine is gone.
func (c *Container) lost() {
	for _, p := range c.all() {
		p.lose()
	}
}

// Delete removes a container that is stopped or was never started: in the
// guest, on the host, poststop hooks. Running: ErrFailedPrecondition. On a
// sandbox whose machine is gone it succeeds.
func (c *Container) Delete(ctx context.Context) error {
	if err := c.init.claim("delete", Created, Stopped); err != nil {
		return fmt.Errorf("delete container %q: %w", c.id, err)
	}
	c.remove(ctx)
	c.s.forget(c.id)
	return nil
}

// remove undoes the creation. What can't be undone is left for Stop: there is
// nothing that a caller could do about it.
func (c *Container) remove(ctx context.Context) {
	c.removal.Do(func() {
		c.closeExecs()
		if err := c.undo.Run(); err != nil {
			log.G(ctx).WithError(err).WithField("container_id", c.id).Warn("container was not removed whole")
		}
	})
}

func (c *Container) closeExecs() {
	for _, p := range c.all() {
		if p != c.init {
			_ = p.closeStreams()
		}
	}
}

// removeInGuest has the guest forget the container, once its last statistics
// are taken. A guest that can't is not waited for longer than ctx.
func (c *Container) removeInGuest(ctx context.Context) {
	select {
	case <-c.init.done:
		_ = await(ctx, c.final)
	default:
	}
	if err := c.guest().StopContainer(ctx, c.id); err != nil && c.s.alive() == nil {
		log.G(ctx).WithError(err).WithField("container_id", c.id).Warn("guest did not remove the container")
	}
}
