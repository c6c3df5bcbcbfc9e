package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/storage"
)

const (
	// probeInterval is how often the agent is asked whether it serves, in case
	// that it is one that does not say so by itself.
	probeInterval = 3 * time.Second
	// probeTimeout bounds one question.
	probeTimeout = time.Second
	// attendInterval is how often the guest is told the time, and its machine's
	// helpers are looked at.
	attendInterval = 30 * time.Second
	// agentGrace is how long a machine has to end by itself when its agent is
	// gone.
	agentGrace = 5 * time.Second
	// lostCalls is how often a call that waits for an event is made again.
	lostCalls = 3
	// emptyName is the directory in which a pod's own task process is rooted.
	emptyName = "empty"
)

// errStopped is why calls fail from Stop on.
var errStopped = fmt.Errorf("sandbox was stopped: %w", errdefs.ErrUnavailable)

// Start boots the machine for a sandbox whose first container has the given
// spec (annotations, netns, cgroup path, sizes are taken from it), and creates
// the sandbox in the guest. On error or cancel nothing is left.
func (s *Sandbox) Start(ctx context.Context, spec *specs.Spec) (err error) {
	if err := cmp.Or(checkSpec(spec, s.opts.Pod, nil), checkNetwork(spec)); err != nil {
		return s.neverStarted(fmt.Errorf("start sandbox %q: %w", s.opts.ID, err))
	}
	if err := s.claimStart(); err != nil {
		return fmt.Errorf("start sandbox %q: %w", s.opts.ID, err)
	}
	ctx, leave, err := s.enter(ctx, &s.boots)
	if err != nil {
		return fmt.Errorf("start sandbox %q: %w", s.opts.ID, err)
	}
	defer leave()
	var undo cleanup.Stack
	if err := s.boot(ctx, spec, &undo); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return s.failed(fmt.Errorf("start sandbox %q: %w", s.opts.ID, err), &undo)
	}
	s.undo = undo.Take()
	close(s.up)
	return nil
}

func (s *Sandbox) claimStart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return errStopped
	}
	if s.starting {
		return fmt.Errorf("twice: %w", errdefs.ErrAlreadyExists)
	}
	s.starting = true
	return nil
}

// neverStarted ends a sandbox that did nothing yet.
func (s *Sandbox) neverStarted(err error) error {
	if claim := s.claimStart(); claim != nil {
		return claim
	}
	return s.failed(err, &cleanup.Stack{})
}

// failed undoes a start: first what others do in the meantime, then its own
// steps.
func (s *Sandbox) failed(err error, undo *cleanup.Stack) error {
	s.end(err)
	s.tasks.Wait()
	if left := errors.Join(s.network.close(), undo.Run()); left != nil {
		err = errors.Join(err, left)
	}
	s.setErr(err)
	s.closeGone()
	s.jobs.Wait()
	return err
}

func (s *Sandbox) setErr(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopping {
		s.err = err
	}
}

// boot is the order of start. What it adds to undo goes back to the state
// before.
func (s *Sandbox) boot(ctx context.Context, spec *specs.Spec, undo *cleanup.Stack) error {
	machine := s.machineSpec(spec)
	for _, step := range []func(context.Context, *specs.Spec, *hypervisor.Spec, *cleanup.Stack) error{
		s.makeDir, s.makeState, s.joinCgroup, s.makeShare, s.makeTemplate, s.startMachine, s.serveConsole, s.findAgent, s.startSandbox,
	} {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := step(ctx, spec, &machine, undo); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// machineSpec describes the machine.
func (s *Sandbox) machineSpec(spec *specs.Spec) hypervisor.Spec {
	want := limitsOf(spec)
	m := s.opts.Config.machine(s.opts.Pod, want)
	if s.opts.Pod {
		s.mu.Lock()
		s.pod = want
		s.mu.Unlock()
	}
	m.Name = s.opts.ID
	m.Shares = append(slices.Clip(m.Shares), hypervisor.Share{Tag: storage.Tag, Dir: s.share()})
	return m
}

// machine is what all sandboxes of that kind and with these limits have.
func (c Config) machine(pod bool, want limits) hypervisor.Spec {
	host := hostCapacity()
	m := size(c.Machine, want, host)
	if pod {
		m = roomToGrow(m, host)
	}
	if m.Arch == "" {
		m.Arch = runtime.GOARCH
	}
	return m
}

// Machines are those of sandboxes without limits, by what they are for: the ones
// that a template is worth while for.
func (c Config) Machines() map[string]hypervisor.Spec {
	return map[string]hypervisor.Spec{"container": c.machine(false, limits{}), "pod": c.machine(true, limits{})}
}

// hostCapacity is what this host has.
func hostCapacity() capacity {
	c := capacity{CPUs: runtime.NumCPU()}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		c.MemoryMiB = int(info.Totalram * uint64(info.Unit) >> 20)
	}
	return c
}

// makeDir makes the sandbox's directory, after what a crash may have left
// there was cleaned up.
func (s *Sandbox) makeDir(ctx context.Context, _ *specs.Spec, _ *hypervisor.Spec, undo *cleanup.Stack) error {
	dir := s.opts.Dir
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if st, _ := ReadState(dir); st != nil && st.Shim.PID != os.Getpid() && alive(st.Shim) {
			return fmt.Errorf("process %d has it: %w", st.Shim.PID, errdefs.ErrAlreadyExists)
		}
		log.G(ctx).WithField("dir", dir).Warn("cleaning up after a sandbox of the same name")
		if err := Reap(ctx, dir); err != nil {
			return fmt.Errorf("clean up %s: %w", dir, err)
		}
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	undo.Add(func() error { return os.RemoveAll(dir) })
	return nil
}

func (s *Sandbox) makeState(_ context.Context, _ *specs.Spec, m *hypervisor.Spec, undo *cleanup.Stack) error {
	undo.Add(func() error { s.state.close(); return nil })
	if err := s.state.open(); err != nil {
		return err
	}
	return s.state.update(func(st *State) { st.VCPUs, st.MemoryMiB = m.VCPUs, m.MemoryMiB })
}

// makeShare makes what CreateContainer needs.
func (s *Sandbox) makeShare(ctx context.Context, spec *specs.Spec, _ *hypervisor.Spec, undo *cleanup.Stack) error {
	if err := storage.MakeShare(s.share()); err != nil {
		return err
	}
	undo.Add(func() error { return storage.RemoveShare(s.share()) })
	if s.opts.Pod {
		if err := os.Mkdir(s.path(emptyName), 0o555); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		if spec.Linux != nil {
			s.sysctls = maps.Clone(spec.Linux.Sysctl)
		}
		s.shm = shmSource(spec)
	}
	if err := s.writeFiles(); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	s.state.mark(ctx, PhasePrepared, time.Now())
	close(s.prepared)
	return nil
}

// makeTemplate makes what this machine and others like it go on from. Without it
// they boot.
func (s *Sandbox) makeTemplate(ctx context.Context, spec *specs.Spec, machine *hypervisor.Spec, _ *cleanup.Stack) error {
	if s.opts.MakeTemplate == nil || limitsOf(spec) != (limits{}) {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, s.opts.Config.StartTimeout)
	defer cancel()
	made, err := s.opts.MakeTemplate(limited, *machine, s.vmOptions())
	switch {
	case made:
		s.state.mark(ctx, PhaseTemplate, time.Now())
	case err == nil:
		return nil
	case ctx.Err() == nil:
		log.G(ctx).WithError(err).Warn("no template was made")
	}
	return s.state.update(func(st *State) { st.Processes = nil }) // they have ended
}

func (s *Sandbox) vmOptions() VMOptions {
	return VMOptions{
		Dir:      s.opts.Dir,
		Env:      []string{mark(s.opts.Dir)},
		Started:  s.state.process,
		CgroupFD: s.cgroup.fd(),
	}
}

// startMachine starts QEMU. A goroutine watches it from then on.
func (s *Sandbox) startMachine(ctx context.Context, _ *specs.Spec, spec *hypervisor.Spec, undo *cleanup.Stack) error {
	machine, err := s.opts.StartVM(ctx, *spec, s.vmOptions())
	if err != nil {
		return fmt.Errorf("start machine: %w", err)
	}
	s.machine = machine
	undo.Add(machine.Kill)
	s.state.mark(ctx, PhaseMachine, time.Now())
	s.agent = agent.New(agent.Settings{
		Dial:           machine.Dial,
		URL:            machine.AgentURL(extension.AgentPort),
		RequestTimeout: s.opts.Config.RequestTimeout,
	})
	undo.Add(func() error {
		s.agent.MarkDead(errStopped)
		return s.agent.Cleanup(context.WithoutCancel(ctx))
	})
	close(s.running)
	return s.state.update(func(st *State) { st.Agent = machine.AgentURL(extension.AgentPort) })
}

// findAgent waits until the agent serves.
func (s *Sandbox) findAgent(ctx context.Context, _ *specs.Spec, _ *hypervisor.Spec, _ *cleanup.Stack) error {
	limit := s.opts.Config.StartTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v: %w", limit, context.DeadlineExceeded))
	defer cancel()
	if err := awaitAgent(ctx, s.machine, s.agent.Check); err != nil {
		return fmt.Errorf("wait for the guest's agent: %w", err)
	}
	s.state.mark(context.WithoutCancel(ctx), PhaseAgent, time.Now())
	return nil
}

// awaitAgent waits for the guest to say that its agent serves, or for an
// answer: an agent that says nothing is asked.
func awaitAgent(ctx context.Context, m Machine, check func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	answer, last := make(chan error, 1), errors.New("it was not asked yet")
	asking := false
	defer func() {
		cancel()
		if asking {
			last = <-answer
		}
	}()
	timer := time.NewTimer(probeInterval)
	defer timer.Stop()
	for {
		select {
		case <-m.Ready():
			return nil
		case <-m.Done():
			return machineErr(m)
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w; console: %s", context.Cause(ctx), last, m.Console())
		case <-timer.C:
			asking = true
			go func() { // joined above
				ctx, cancel := context.WithTimeout(ctx, probeTimeout)
				defer cancel()
				answer <- check(ctx)
			}()
		case last = <-answer:
			if asking = false; last == nil {
				return nil
			}
			timer.Reset(probeInterval)
		}
	}
}

// abort kills a machine that is of no use any more, for a reason that Err says.
func (s *Sandbox) abort(ctx context.Context, cause error) {
	log.G(ctx).WithError(cause).Error("killing the machine")
	s.mu.Lock()
	if s.aborted == nil {
		s.aborted = cause
	}
	s.mu.Unlock()
	if err := s.machine.Kill(); err != nil {
		log.G(ctx).WithError(err).Error("machine was not killed")
	}
}

// machineErr is why a machine is gone.
func machineErr(m Machine) error {
	if err := m.Err(); err != nil {
		return fmt.Errorf("machine is gone: %w: %w", err, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("machine is gone: it powered off: %w", errdefs.ErrUnavailable)
}

// startSandbox creates the sandbox in the guest and starts what goes on for as
// long as it is there.
func (s *Sandbox) startSandbox(ctx context.Context, spec *specs.Spec, _ *hypervisor.Spec, undo *cleanup.Stack) error {
	life, quit := context.WithCancel(context.WithoutCancel(ctx))
	undo.Add(func() error { quit(); return nil })
	// Asked beside, and known when the first streams are opened.
	s.jobs.Go(func() { _, _ = s.agent.Capabilities(life) })
	if s.machine.Restored() {
		if err := agent.Renew(ctx, s.agent); err != nil {
			return s.because(err)
		}
	}
	if err := s.agent.StartSandbox(ctx, agent.Sandbox{Request: sandboxRequest(s.opts.ID, spec)}); err != nil {
		return fmt.Errorf("create sandbox in the guest: %w", s.because(err))
	}
	s.jobs.Go(func() { s.watchMachine(life) })
	s.jobs.Go(func() { s.watchOOM(life) })
	s.jobs.Go(func() { s.attend(life) })
	s.state.mark(ctx, PhaseSandbox, time.Now())
	return s.state.update(func(st *State) { st.Ready = true })
}

// because adds why the machine is gone to the error of a call that this ended.
func (s *Sandbox) because(err error) error {
	if errdefs.IsUnavailable(err) {
		select {
		case <-s.machine.Done():
		case <-time.After(endGrace):
		}
	}
	select {
	case <-s.machine.Done():
		return fmt.Errorf("%w: %w", machineErr(s.machine), err)
	default:
		return err
	}
}

func sandboxRequest(id string, spec *specs.Spec) *protocol.CreateSandboxRequest {
	hostname := spec.Hostname
	if hostname == "" {
		// As in a new uts namespace of the host.
		hostname, _ = os.Hostname()
	}
	return &protocol.CreateSandboxRequest{
		SandboxId: id,
		Hostname:  hostname[:min(len(hostname), 64)], // __NEW_UTS_LEN
		Storages: []*protocol.Storage{{
			Driver: "virtio-fs", Source: storage.Tag, Fstype: "virtiofs", MountPoint: storage.GuestDir + "/",
		}, {
			Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: storage.GuestShm,
			Options: []string{"noexec", "nosuid", "nodev", "mode=1777", fmt.Sprintf("size=%d", shmSize(spec))},
		}},
	}
}

// watchMachine sees the machine's end, and ends with it what was in it.
func (s *Sandbox) watchMachine(ctx context.Context) {
	select {
	case <-s.machine.Done():
	case <-ctx.Done():
		return
	}
	err := machineErr(s.machine)
	s.mu.Lock()
	if s.aborted != nil {
		err = fmt.Errorf("machine was killed: %w: %w", s.aborted, errdefs.ErrUnavailable)
	}
	s.mu.Unlock()
	if s.hostOOM() {
		err = fmt.Errorf("the host's kernel killed it for lack of memory: %w", err)
	}
	s.setErr(err)
	s.lost(err)
}

// lost ends everything in a machine that is gone.
func (s *Sandbox) lost(cause error) {
	s.end(cause)
	s.agent.MarkDead(cause)
	for _, c := range s.created() {
		c.lost()
	}
	s.closeGone()
}

// watchOOM reports what the guest's kernel killed, for as long as the guest
// answers. Kills that ended a process are reported with its exit as well.
func (s *Sandbox) watchOOM(ctx context.Context) {
	for lost := 0; lost < lostCalls; {
		id, err := s.agent.OOMEvent(ctx)
		switch {
		case err == nil:
			lost = 0
			if c, err := s.Container(id); err == nil {
				c.reportOOM()
			}
		case s.servesAfter(ctx, err):
			lost++
		default:
			if ctx.Err() == nil && s.alive() == nil {
				log.G(ctx).WithError(err).Warn("out-of-memory events are no longer received")
			}
			return
		}
	}
}

// servesAfter says whether a call that failed is worth another try: the
// connection was lost, and the agent serves on a new one. A guest whose agent
// does not is of no use: its machine has a moment to end by itself, and to say
// why.
func (s *Sandbox) servesAfter(ctx context.Context, err error) bool {
	if !errdefs.IsUnavailable(err) || s.alive() != nil {
		return false
	}
	check, cancel := context.WithTimeout(ctx, agentGrace)
	defer cancel()
	if s.agent.Check(check) == nil {
		return true
	}
	select {
	case <-s.gone:
	case <-ctx.Done():
	case <-time.After(agentGrace):
		s.abort(ctx, fmt.Errorf("guest's agent does not serve any more: %w", err))
		// Its processes end with it, and have its code.
		select {
		case <-s.gone:
		case <-ctx.Done():
		}
	}
	return false
}

// attend does what a running machine needs now and then: a look at what tells
// no event, and the time for the guest, whose own clock starts with whole seconds
// and stops whenever the machine does.
func (s *Sandbox) attend(ctx context.Context) {
	tick := time.NewTicker(attendInterval)
	defer tick.Stop()
	for clock := true; ; {
		s.machine.Examine()
		if clock {
			err := s.agent.SetGuestDateTime(ctx, time.Now())
			clock = !errdefs.IsNotImplemented(err)
			if clock && err != nil && ctx.Err() == nil && s.alive() == nil {
				log.G(ctx).WithError(err).Warn("the guest's clock is not set")
			}
		}
		select {
		case <-tick.C:
		case <-s.gone:
			return
		case <-ctx.Done():
			return
		}
	}
}
