package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/storage"
)

const (
	// cleanupTimeout bounds what undoes a step.
	cleanupTimeout = 10 * time.Second
	// endGrace bounds the wait for the end of a machine whose connections broke:
	// its kernel closes them before the process is gone.
	endGrace = time.Second
)

// ContainerConfig is what Create needs.
type ContainerConfig struct {
	ID      string
	Bundle  string
	Spec    *specs.Spec // the host's; not changed
	Rootfs  []storage.Mount
	Streams agent.StreamSet
	// Terminal overrides spec.process.terminal, as containerd's request does.
	Terminal bool
	// Pause says that the container stands for a pod: nothing of it is in the
	// guest, and it runs until it is killed.
	Pause bool
}

// CreateContainer makes a container, its task process on the host and its
// streams. It may be called while Start runs: host work goes on beside the
// boot. On error or cancel nothing of the container is left.
func (s *Sandbox) CreateContainer(ctx context.Context, cfg ContainerConfig) (_ *Container, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create container %q: %w", cfg.ID, err)
		}
	}()
	ctx, leave, err := s.enter(ctx, &s.tasks)
	if err != nil {
		return nil, err
	}
	defer leave()
	if err := checkSpec(cfg.Spec, s.opts.Pod, s.tasksByPID()); err != nil {
		return nil, err
	}
	if err := checkNetwork(cfg.Spec); err != nil {
		return nil, err
	}
	if err := s.reserve(cfg.ID); err != nil {
		return nil, err
	}
	c := newContainer(s, cfg)
	if err := c.create(ctx, cfg); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		err = errors.Join(err, c.undo.Run())
		s.forget(cfg.ID)
		return nil, err
	}
	s.mu.Lock()
	s.containers[cfg.ID] = c
	ended := s.ended
	s.mu.Unlock()
	if ended != nil { // after the machine's end was told to all that was there
		c.lost()
	}
	return c, nil
}

// reserve takes an id.
func (s *Sandbox) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.containers[id]; taken {
		return errdefs.ErrAlreadyExists
	}
	s.containers[id] = nil
	return nil
}

func (s *Sandbox) forget(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
}

// tasksByPID are the containers there are, by their task pids.
func (s *Sandbox) tasksByPID() map[int]*Container {
	tasks := map[int]*Container{}
	for _, c := range s.created() {
		tasks[c.PID()] = c
	}
	return tasks
}

// create is the order of creation. What it adds to the container's undo goes
// back to the state before.
func (c *Container) create(ctx context.Context, cfg ContainerConfig) error {
	if err := await(ctx, c.s.prepared); err != nil {
		return err
	}
	for _, step := range []func(context.Context, ContainerConfig) error{
		c.record, c.mount, c.startTask, c.runCreateHooks, c.joinNetwork,
		c.awaitSandbox, c.configureNetwork, c.makeRoom, c.createInGuest, c.openStreams,
	} {
		if err := step(ctx, cfg); err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
	}
	c.init.watch(ctx)
	c.s.state.mark(ctx, PhaseContainer, time.Now())
	return nil
}

// await waits for what a channel's end says.
func await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// record makes the container known to whoever has to clean up.
func (c *Container) record(ctx context.Context, cfg ContainerConfig) error {
	c.undo.Add(func() error {
		c.runStopHooks(ctx)
		return c.s.state.update(func(st *State) { delete(st.Containers, c.id) })
	})
	return c.s.state.container(c.id, func(st *ContainerState) {
		st.Bundle, st.Created = cfg.Bundle, time.Now()
	})
}

// mount puts the container's files below the share, and settles what the guest
// is told.
func (c *Container) mount(ctx context.Context, cfg ContainerConfig) error {
	if c.pause != nil {
		c.root = c.s.path(emptyName)
		return nil
	}
	want := storage.Container{
		ID: cfg.ID, Bundle: cfg.Bundle, Rootfs: cfg.Rootfs, Root: cfg.Spec.Root,
		Mounts: c.s.addFiles(cfg.Spec), Shm: c.s.shm, HugePages: resourcesOf(cfg.Spec).HugepageLimits,
	}
	facts, err := storage.Look(c.s.share(), want)
	if err != nil {
		return err
	}
	plan, err := storage.NewPlan(want, facts)
	if err != nil {
		return err
	}
	guest, err := newGuestSpec(cfg.Spec, cfg.ID, cfg.Terminal, plan, c.s.tasksByPID())
	if err != nil {
		return err
	}
	guest.addSysctls(c.s.sysctls)
	if len(guest.notes) > 0 {
		log.G(ctx).WithField("left_out", guest.notes).Warn("the guest does not get all that the specification names")
	}
	if err := storage.Apply(ctx, plan); err != nil {
		return err
	}
	c.undo.Add(func() error { return storage.Remove(plan.Dir) })
	c.root = plan.HostRoot()
	c.request = &protocol.CreateContainerRequest{
		ContainerId:    cfg.ID,
		ExecId:         cfg.ID,
		Storages:       plan.Storages,
		OCI:            wireSpec(&guest.Spec),
		SandboxPidns:   guest.shared,
		PidNamespaceOf: guest.pidOf,
		NoStdin:        !cfg.Streams.Stdin,
	}
	return nil
}

// startTask starts the task process.
func (c *Container) startTask(ctx context.Context, cfg ContainerConfig) error {
	var namespaces []specs.LinuxNamespace
	if cfg.Spec.Linux != nil {
		namespaces = cfg.Spec.Linux.Namespaces
	}
	a, err := startAnchor(ctx, anchorPlan{
		Name: "vmshim-anchor " + cfg.ID, Root: c.root, Hostname: cfg.Spec.Hostname, Namespaces: namespaces,
	}, mark(c.s.opts.Dir), func(p hypervisor.Process) error {
		return c.s.state.container(c.id, func(st *ContainerState) { st.Task = p })
	})
	if err != nil {
		return err
	}
	c.undo.Add(func() error { a.stop(); return nil })
	c.pid = a.PID
	return nil
}

// runCreateHooks runs those that OCI wants before the container's own process
// is made. Those of its end run in any case from then on.
func (c *Container) runCreateHooks(ctx context.Context, cfg ContainerConfig) error {
	defer func() { c.s.state.mark(context.WithoutCancel(ctx), PhaseHost, time.Now()) }()
	hooks := cfg.Spec.Hooks
	if hooks == nil {
		return nil
	}
	c.hooked = true
	if err := c.s.state.container(c.id, func(st *ContainerState) { st.Hooked = true }); err != nil {
		return err
	}
	state := hookState(cfg.Spec, c.id, c.bundle, specs.StateCreating, c.pid)
	timeout := c.s.opts.Config.HookTimeout
	if err := runHooks(ctx, "prestart", hooks.Prestart, state, timeout); err != nil { //nolint:staticcheck // deprecated, and still used
		return err
	}
	return runHooks(ctx, "createRuntime", hooks.CreateRuntime, state, timeout)
}

// joinNetwork plugs what the hooks, or whoever made the namespace, put there.
func (c *Container) joinNetwork(ctx context.Context, _ ContainerConfig) error {
	if path := netnsOf(c.spec); path != "" {
		return c.s.network.join(ctx, path, true)
	}
	return c.s.network.join(ctx, fmt.Sprintf("/proc/%d/ns/net", c.pid), false)
}

// runStopHooks runs those of the end, when all else is gone.
func (c *Container) runStopHooks(ctx context.Context) {
	if c.hooked {
		ctx := context.WithoutCancel(ctx)
		tryHooks(ctx, "poststop", c.spec.Hooks.Poststop, c.hookState(specs.StateStopped, 0), c.s.opts.Config.HookTimeout)
	}
}

// awaitSandbox waits for the guest.
func (c *Container) awaitSandbox(ctx context.Context, _ ContainerConfig) error {
	return await(ctx, c.s.up)
}

// makeRoom has the machine grow with a pod.
func (c *Container) makeRoom(ctx context.Context, cfg ContainerConfig) error {
	if c.pause != nil {
		return nil
	}
	want := resourceLimits(resourcesOf(cfg.Spec))
	c.s.setLimits(c.id, &want)
	c.undo.Add(func() error {
		c.s.setLimits(c.id, nil)
		return nil
	})
	c.s.fit(ctx)
	return nil
}

func (c *Container) configureNetwork(ctx context.Context, _ ContainerConfig) error {
	return c.s.network.configure(ctx)
}

func (c *Container) createInGuest(ctx context.Context, _ ContainerConfig) error {
	// Also after an error: a call that was cancelled may have been carried out.
	c.undo.Add(func() error {
		ctx, cancel := within(ctx, cleanupTimeout)
		defer cancel()
		c.removeInGuest(ctx)
		return nil
	})
	request := c.request
	c.request = nil
	if err := c.guest().CreateContainer(ctx, request); err != nil {
		return c.s.because(err)
	}
	return nil
}

func (c *Container) openStreams(ctx context.Context, cfg ContainerConfig) error {
	streams, err := c.guest().Streams(ctx, c.id, c.id, cfg.Streams)
	if err != nil {
		return fmt.Errorf("open streams: %w", c.s.because(err))
	}
	c.init.setStreams(ctx, streams)
	c.undo.Add(streams.Close)
	return nil
}
