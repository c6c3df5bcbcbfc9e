package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/storage"
)

func TestRootLifecycle(t *testing.T) {
	e := newEnv(t)
	e.program = func(p *agenttest.Process) int {
		in, _ := io.ReadAll(p.Stdin)
		fmt.Fprintf(p.Stdout, "out %s", in)
		fmt.Fprint(p.Stderr, "err")
		return 3
	}
	agenttest.Handle(e.peer, "StatsContainer", func(context.Context, *protocol.StatsContainerRequest) (*protocol.StatsContainerResponse, error) {
		return &protocol.StatsContainerResponse{CgroupStats: &protocol.CgroupStats{MemoryEvents: map[string]uint64{"oom_kill": 7}}}, nil
	})
	s := e.sandbox()
	var c *Container
	var g errgroup.Group
	cfg := e.config("c1")
	g.Go(func() error { return s.Start(t.Context(), cfg.Spec) })
	g.Go(func() (err error) {
		c, err = s.CreateContainer(t.Context(), cfg)
		return err
	})
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := c.Status(); got != Created {
		t.Errorf("status %s", got)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/etc/id", c.PID())); string(b) != "c1" {
		t.Errorf("root of the task has %q: %v", b, err)
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	fails(t, c.Start(t.Context()), errdefs.ErrFailedPrecondition)
	fails(t, c.Delete(t.Context()), errdefs.ErrFailedPrecondition, "running")
	if _, err := io.WriteString(c.Init().Stdin(), "in"); err != nil {
		t.Error(err)
	}
	if err := c.Init().Stdin().Close(); err != nil {
		t.Error(err)
	}
	if got := readAll(t, c.Init().Stdout()); got != "out in" {
		t.Errorf("stdout %q", got)
	}
	if got := readAll(t, c.Init().Stderr()); got != "err" {
		t.Errorf("stderr %q", got)
	}
	ended(t, "process", c.Init().Done())
	if got := c.Init().Exit(); got.Code != 3 || got.ExitedAt.IsZero() {
		t.Errorf("exit %+v", got)
	}
	fails(t, c.Kill(t.Context(), 9, false), errdefs.ErrNotFound)
	if stats, err := c.Stats(t.Context()); err != nil || stats.GetCgroupStats().GetMemoryEvents()["oom_kill"] != 7 {
		t.Errorf("statistics after the end: %v %v", stats, err)
	}

	st, err := ReadState(e.opts.Dir)
	if err != nil {
		t.Fatal(err)
	}
	var phases []string
	for _, p := range st.Timeline {
		phases = append(phases, p.Name)
	}
	want := []string{PhaseAgent, PhaseContainer, PhaseHost, PhaseMachine, PhaseOutput, PhasePrepared, PhaseSandbox, PhaseShim, PhaseStarted}
	if diff := cmp.Diff(want, slices.Sorted(slices.Values(phases))); diff != "" {
		t.Errorf("phases (-want +got):\n%s", diff)
	}
	if !st.Ready || st.Shim.PID != os.Getpid() || len(st.Processes) != 1 || st.Containers["c1"].Task.PID != c.PID() ||
		st.Containers["c1"].Bundle != cfg.Bundle || st.MemoryMiB != 256 {
		t.Errorf("state %+v", st)
	}

	if err := c.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if alive(st.Containers["c1"].Task) {
		t.Error("task process is left")
	}
	if _, err := s.Container("c1"); !errdefs.IsNotFound(err) {
		t.Errorf("container is still there: %v", err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended(t, "sandbox", s.Done())
	if err := s.Err(); err != nil {
		t.Error(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	e.clean()

	var asked []string
	for _, c := range e.peer.Calls() {
		if !slices.Contains([]string{"SetGuestDateTime", "GetOOMEvent", "GetGuestDetails", "StatsContainer", "WaitProcess"}, c.Method) {
			asked = append(asked, c.Method)
		}
	}
	if diff := cmp.Diff([]string{
		"Check", "CreateSandbox", "CreateContainer", "StartContainer", "RemoveContainer", "DestroySandbox",
	}, asked); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	request := e.peer.Calls("CreateSandbox")[0].Request.(*protocol.CreateSandboxRequest)
	if request.GetHostname() != "box" || request.GetSandboxId() != "sb" || request.GetStorages()[0].GetSource() != storage.Tag {
		t.Errorf("request %v", request)
	}
	create := e.peer.Calls("CreateContainer")[0].Request.(*protocol.CreateContainerRequest)
	if got := create.GetOCI().GetRoot().GetPath(); got != storage.GuestDir+"/c1/rootfs" {
		t.Errorf("root in the guest %q", got)
	}
}

func TestRootExec(t *testing.T) {
	e := newEnv(t)
	e.program = func(p *agenttest.Process) int {
		if p.Exec == nil {
			<-p.Signals // SIGUSR1 ends it
			return 0
		}
		if p.Exec.GetProcess().GetArgs()[0] == "long" {
			_, _ = p.Stdin.Read(make([]byte, 1))
			return 0
		}
		fmt.Fprintf(p.Stdout, "%s %v", p.Exec.GetProcess().GetArgs()[0], p.Exec.GetProcess().GetConsoleSize().GetWidth())
		return 5
	}
	s := e.running()
	c := e.container(s, "c1")
	cfg := ExecConfig{ID: "e1", Process: testSpec().Process, Terminal: true}
	cfg.Streams.Stdout = true
	_, err := c.Exec(t.Context(), cfg)
	fails(t, err, errdefs.ErrFailedPrecondition, "created")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := c.Exec(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Exec(t.Context(), cfg)
	fails(t, err, errdefs.ErrAlreadyExists)
	_, err = c.Exec(t.Context(), ExecConfig{ID: "c1", Process: cfg.Process})
	fails(t, err, errdefs.ErrAlreadyExists)
	_, err = c.Exec(t.Context(), ExecConfig{ID: "e2"})
	fails(t, err, errdefs.ErrInvalidArgument)
	fails(t, p.Kill(t.Context(), 9), errdefs.ErrFailedPrecondition)
	if p.Stdout() != nil || p.Stdin() != nil || p.Stderr() != nil {
		t.Error("streams before the start")
	}
	if err := p.Resize(t.Context(), 24, 81); err != nil {
		t.Error(err)
	}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	fails(t, p.Start(t.Context()), errdefs.ErrFailedPrecondition)
	if err := p.Resize(t.Context(), 24, 82); err != nil {
		t.Error(err)
	}
	if got := readAll(t, p.Stdout()); got != "sh 81" {
		t.Errorf("stdout %q", got)
	}
	if p.Stdin() != nil || p.Stderr() != nil {
		t.Error("streams that were not asked for")
	}
	ended(t, "process", p.Done())
	if got := p.Exit().Code; got != 5 {
		t.Errorf("exit code %d", got)
	}
	fails(t, p.Kill(t.Context(), 9), errdefs.ErrNotFound)
	if err := p.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	_, err = c.Process("e1")
	fails(t, err, errdefs.ErrNotFound)
	if p, err := c.Process(""); err != nil || p != c.Init() {
		t.Errorf("first process: %v %v", p, err)
	}

	long, err := c.Exec(t.Context(), ExecConfig{ID: "long", Process: &specs.Process{Args: []string{"long"}, Cwd: "/", ApparmorProfile: "x"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := long.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	fails(t, long.Delete(t.Context()), errdefs.ErrFailedPrecondition)
	if err := long.Kill(t.Context(), uint32(syscall.SIGKILL)); err != nil {
		t.Error(err)
	}
	ended(t, "process", long.Done())
	if got := long.Exit().Code; got != 137 {
		t.Errorf("exit code %d", got)
	}

	missing, err := c.Exec(t.Context(), ExecConfig{ID: "missing", Process: cfg.Process})
	if err != nil {
		t.Fatal(err)
	}
	e.peer.Handle("ExecProcess", func(context.Context, proto.Message) (proto.Message, error) {
		return nil, errors.New("executable file not found")
	})
	fails(t, missing.Start(t.Context()), nil, "start \"missing\" in container \"c1\"", "executable file not found")
	if err := missing.Delete(t.Context()); err != nil {
		t.Error(err)
	}

	fails(t, c.Init().Delete(t.Context()), errdefs.ErrInvalidArgument)
	if err := c.Init().Kill(t.Context(), uint32(syscall.SIGUSR1)); err != nil {
		t.Error(err)
	}
	ended(t, "container", c.Init().Done())
	_, err = c.Exec(t.Context(), cfg)
	fails(t, err, errdefs.ErrFailedPrecondition, "stopped")
	fails(t, c.Pause(t.Context()), errdefs.ErrFailedPrecondition)
	fails(t, c.Update(t.Context(), testSpec().Linux.Resources), errdefs.ErrFailedPrecondition)
}

func TestRootPauseUpdate(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	c := e.container(s, "c1")
	fails(t, c.Pause(t.Context()), errdefs.ErrFailedPrecondition)
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		do   func(context.Context) error
		want Status
	}{{c.Pause, Paused}, {c.Resume, Running}} {
		if err := step.do(t.Context()); err != nil {
			t.Error(err)
		}
		if got := c.Status(); got != step.want {
			t.Errorf("status %s, want %s", got, step.want)
		}
	}
	fails(t, c.Resume(t.Context()), errdefs.ErrFailedPrecondition)
	fails(t, c.Update(t.Context(), nil), errdefs.ErrInvalidArgument)
	if err := c.Update(t.Context(), resourcesOf(testSpec())); err != nil {
		t.Error(err)
	}
}

// TestRootKillWaitsForNothing hangs everything else that a guest can be asked.
func TestRootKillWaitsForNothing(t *testing.T) {
	e := newEnv(t)
	hang := func(ctx context.Context) (*emptypb.Empty, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	s := e.running()
	c := e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	arrived := make(chan string, 10)
	agenttest.Handle(e.peer, "CreateContainer", func(_ context.Context, _ *protocol.CreateContainerRequest) (*emptypb.Empty, error) {
		arrived <- "create"
		return hang(ctx)
	})
	agenttest.Handle(e.peer, "ExecProcess", func(_ context.Context, _ *protocol.ExecProcessRequest) (*emptypb.Empty, error) {
		arrived <- "exec"
		return hang(ctx)
	})
	agenttest.Handle(e.peer, "StatsContainer", func(_ context.Context, _ *protocol.StatsContainerRequest) (*protocol.StatsContainerResponse, error) {
		arrived <- "stats"
		_, err := hang(ctx)
		return nil, err
	})
	var g errgroup.Group
	g.Go(func() error { _, err := s.CreateContainer(ctx, e.config("c2")); return err })
	g.Go(func() error { _, err := c.Stats(ctx); return err })
	g.Go(func() error {
		p, err := c.Exec(ctx, ExecConfig{ID: "e1", Process: testSpec().Process})
		if err != nil {
			return err
		}
		return p.Start(ctx)
	})
	for range 3 {
		<-arrived
	}
	start := time.Now()
	if err := c.Kill(t.Context(), 9, false); err != nil {
		t.Error(err)
	}
	ended(t, "killed process", c.Init().Done())
	if d := time.Since(start); d > time.Second {
		t.Errorf("kill took %v", d)
	}
	if got := c.Init().Exit().Code; got != 137 {
		t.Errorf("exit code %d", got)
	}
	cancel()
	if err := g.Wait(); err == nil {
		t.Error("what was cancelled succeeded")
	}
}

// TestRootKillUnheard has a guest that does not carry out a SIGKILL: what is
// alone in its machine ends with it.
func TestRootKillUnheard(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	s := e.running()
	c := e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	defer close(release)
	e.peer.Handle("Signal", func(context.Context, proto.Message) (proto.Message, error) {
		<-release
		return nil, errdefs.ErrUnavailable
	})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	fails(t, c.Kill(ctx, uint32(syscall.SIGTERM), false), context.DeadlineExceeded)
	if err := c.Kill(t.Context(), uint32(syscall.SIGKILL), false); err != nil {
		t.Error(err)
	}
	ended(t, "container", c.Init().Done())
	fails(t, s.Err(), errdefs.ErrUnavailable, "did not kill its container")
	fails(t, c.Kill(t.Context(), uint32(syscall.SIGKILL), true), errdefs.ErrNotFound)
}

func TestRootPids(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	c := e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	pids, err := c.Pids(t.Context())
	if err != nil || len(pids) != 1 || pids[0].GetPid() != 100 {
		t.Errorf("pids %v %v", pids, err)
	}
	release := make(chan struct{})
	defer close(release)
	e.peer.Handle("Pids", nil)
	e.peer.Handle("Pids", func(context.Context, proto.Message) (proto.Message, error) {
		<-release
		return nil, errdefs.ErrUnavailable
	})
	start := time.Now()
	pids, err = c.Pids(t.Context())
	if err != nil || len(pids) != 1 || pids[0].GetPid() != 100 {
		t.Errorf("pids of a guest that hangs: %v %v", pids, err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("took %v", d)
	}
}

func TestRootMisuse(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	fails(t, s.Start(t.Context(), testSpec()), errdefs.ErrAlreadyExists)
	_, err := s.Container("nobody")
	fails(t, err, errdefs.ErrNotFound)
	c := e.container(s, "c1")
	_, err = s.CreateContainer(t.Context(), e.config("c1"))
	fails(t, err, errdefs.ErrAlreadyExists)
	if diff := cmp.Diff([]string{"c1"}, s.Containers()); diff != "" {
		t.Error(diff)
	}
	_, err = c.Process("e1")
	fails(t, err, errdefs.ErrNotFound)

	for name, change := range map[string]func(*ContainerConfig){
		"no rootfs":    func(cfg *ContainerConfig) { cfg.Spec.Root.Path = "nowhere" },
		"host network": func(cfg *ContainerConfig) { cfg.Spec.Linux.Namespaces = cfg.Spec.Linux.Namespaces[:4] },
		"no command":   func(cfg *ContainerConfig) { cfg.Spec.Process.Args = nil },
		"bad id":       func(cfg *ContainerConfig) { cfg.ID = "../c2" },
		"no netns":     func(cfg *ContainerConfig) { cfg.Spec.Linux.Namespaces[4].Path = "/nowhere" },
	} {
		cfg := e.config("c2")
		change(&cfg)
		_, err := s.CreateContainer(t.Context(), cfg)
		fails(t, err, nil)
		t.Logf("%s: %v", name, err)
		e.nothingOf("c2")
	}
}

// nothingOf asserts that a container left nothing in a sandbox that runs.
func (e *env) nothingOf(id string) {
	e.t.Helper()
	if _, err := os.Stat(filepath.Join(e.opts.Dir, "share", id)); err == nil {
		e.t.Errorf("%s is left in the share", id)
	}
	st, err := ReadState(e.opts.Dir)
	if err != nil {
		e.t.Fatal(err)
	}
	if _, ok := st.Containers[id]; ok {
		e.t.Errorf("%s is left in the state", id)
	}
	found, err := marked(e.opts.Dir)
	if err != nil {
		e.t.Fatal(err)
	}
	for _, p := range found {
		if args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID)); strings.Contains(string(args), id) {
			e.t.Errorf("process %q is left", args)
		}
	}
}

func TestRootGuestRefuses(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	agenttest.Handle(e.peer, "CreateContainer", func(context.Context, *protocol.CreateContainerRequest) (*emptypb.Empty, error) {
		return nil, fmt.Errorf("exec: \"nosuch\": executable file not found in $PATH: %w", errdefs.ErrInvalidArgument)
	})
	_, err := s.CreateContainer(t.Context(), e.config("c1"))
	fails(t, err, errdefs.ErrInvalidArgument, "executable file not found")
	e.nothingOf("c1")
}

func TestRootStartFails(t *testing.T) {
	e := newEnv(t)
	e.startVM = func() error { return errors.New("no qemu") }
	s := e.sandbox()
	fails(t, s.Start(t.Context(), testSpec()), nil, "start sandbox \"sb\": start machine: no qemu")
	_, err := s.CreateContainer(t.Context(), e.config("c1"))
	fails(t, err, nil, "no qemu")
	e.clean()

	s = e.sandbox()
	spec := testSpec()
	spec.Linux.Namespaces = nil
	fails(t, s.Start(t.Context(), spec), errdefs.ErrInvalidArgument, "host's network")
	ended(t, "sandbox", s.Done())
	e.clean()

	s = e.sandbox()
	if err := s.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	ended(t, "sandbox", s.Done())
	fails(t, s.Start(t.Context(), testSpec()), errdefs.ErrUnavailable)
}
