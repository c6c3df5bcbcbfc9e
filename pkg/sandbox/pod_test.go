package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/storage"
)

func namespaces(kinds ...specs.LinuxNamespaceType) (all []specs.LinuxNamespace) {
	for _, kind := range kinds {
		all = append(all, specs.LinuxNamespace{Type: kind})
	}
	return all
}

// podSpec is the one that stands for a pod.
func podSpec() *specs.Spec {
	return &specs.Spec{
		Version: "1.2.0", Process: &specs.Process{Args: []string{"/pause"}, Cwd: "/"}, Root: &specs.Root{Path: "nothing"},
		Linux: &specs.Linux{Namespaces: namespaces("network", "pid", "ipc", "uts", "mount")},
	}
}

// startPod starts the sandbox of a pod and what stands for it.
func startPod(t *testing.T, e *env) (*Sandbox, *Container) {
	t.Helper()
	e.opts.Pod, e.opts.StartVM, e.opts.OnOOM = true, e.start, func(string) {}
	s, err := New(e.opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(t.Context(), podSpec()); err != nil {
		t.Fatal(err)
	}
	c, err := s.CreateContainer(t.Context(), ContainerConfig{ID: "sb", Bundle: t.TempDir(), Spec: podSpec(), Pause: true})
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

func TestPauseIsNotInTheGuest(t *testing.T) {
	for name, tt := range map[string]struct {
		signal unix.Signal
		code   int32
	}{"terminated": {unix.SIGTERM, 0}, "interrupted": {unix.SIGINT, 0}, "killed": {unix.SIGKILL, 137}} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			_, c := startPod(t, e)
			if err := c.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(e.opts.Dir, "share", "sb")); !os.IsNotExist(err) {
				t.Errorf("files of it are shared: %v", err)
			}
			if pids, err := c.Pids(t.Context()); err != nil || len(pids) != 1 || pids[0].GetPid() != uint32(c.PID()) {
				t.Errorf("pids %v, %v, want the task's", pids, err)
			}
			if root, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(c.PID()), "root")); err != nil || len(root) != 0 {
				t.Errorf("its root has %v, %v", root, err)
			}
			if _, err := c.Exec(t.Context(), ExecConfig{ID: "e", Process: &specs.Process{Args: []string{"sh"}}}); err != nil {
				t.Errorf("exec is refused at registration: %v", err)
			} else if p, _ := c.Process("e"); !errdefs.IsNotImplemented(p.Start(t.Context())) {
				t.Error("a process was started in it")
			}
			if err := c.Kill(t.Context(), uint32(unix.SIGHUP), false); err != nil || c.Status() != Running {
				t.Errorf("after SIGHUP: %v, %v", c.Status(), err)
			}
			if err := c.Kill(t.Context(), uint32(tt.signal), false); err != nil {
				t.Error(err)
			}
			select {
			case <-c.Init().Done():
			case <-time.After(10 * time.Second):
				t.Fatal("it runs on")
			}
			if got := c.Init().Exit().Code; got != tt.code {
				t.Errorf("exit code %d, want %d", got, tt.code)
			}
			if _, err := c.Stats(t.Context()); err != nil {
				t.Errorf("statistics of what has ended: %v", err)
			}
			if err := c.Delete(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPauseEndsWithMachine(t *testing.T) {
	e := newEnv(t)
	s, c := startPod(t, e)
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = e.machines[0].Kill()
	select {
	case <-c.Init().Done():
	case <-time.After(10 * time.Second):
		t.Fatal("it runs on")
	}
	if got := c.Init().Exit(); got.Code != 137 {
		t.Errorf("exit %+v", got)
	}
	<-s.Done()
}

func TestPodNamespaces(t *testing.T) {
	pause := &Container{id: "pod", pause: &standIn{}}
	tasks := map[int]*Container{7: pause, 8: {id: "other"}}
	pid := func(path string) []specs.LinuxNamespace {
		return append(namespaces("network", "ipc", "uts"), specs.LinuxNamespace{Type: "pid", Path: path})
	}
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		shared     bool
		of         string
	}{
		"own":         {pid(""), false, ""},
		"pod":         {pid("/proc/7/ns/pid"), true, ""},
		"target":      {pid("/proc/8/ns/pid"), false, "other"},
		"host's":      {namespaces("network"), true, ""},
		"host's, ipc": {namespaces("network", "uts"), true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			spec := podSpec()
			spec.Linux.Namespaces = tt.namespaces
			if err := checkSpec(spec, true, tasks); err != nil {
				t.Fatal(err)
			}
			g, err := newGuestSpec(spec, "c", false, testPlan, tasks)
			if err != nil {
				t.Fatal(err)
			}
			if g.shared != tt.shared || g.pidOf != tt.of {
				t.Errorf("shared %v, of %q", g.shared, g.pidOf)
			}
			for _, ns := range g.Linux.Namespaces {
				if ns.Path != "" {
					t.Errorf("a path of the host is left: %+v", ns)
				}
			}
		})
	}
	spec := podSpec()
	spec.Linux.Namespaces = namespaces("pid", "ipc")
	if err := checkSpec(spec, true, tasks); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("the host's network: %v", err)
	}
}

func TestPodSysctls(t *testing.T) {
	spec := podSpec()
	spec.Linux.Sysctl = map[string]string{"net.a": "container", "net.c": "1"}
	g, err := newGuestSpec(spec, "c", false, testPlan, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.addSysctls(map[string]string{"net.a": "pod", "net.b": "pod"})
	want := map[string]string{"net.a": "container", "net.b": "pod", "net.c": "1"}
	if d := cmp.Diff(want, g.Linux.Sysctl); d != "" {
		t.Error(d)
	}
}

func TestAddFiles(t *testing.T) {
	s := &Sandbox{opts: Options{Dir: "/run/sb", Files: []File{{Destination: "/etc/hosts"}, {Destination: "/etc/hostname"}}}}
	got := s.addFiles(&specs.Spec{Root: &specs.Root{Readonly: true}, Mounts: []specs.Mount{
		{Destination: "/etc/hosts", Type: "bind", Source: "/kubelet"},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm"},
	}})
	want := []specs.Mount{
		{Destination: "/etc/hosts", Type: "bind", Source: "/kubelet"},
		{Destination: "/etc/hostname", Type: "bind", Source: "/run/sb/file1", Options: []string{"rbind", "rprivate", "ro"}},
		{Destination: "/dev/shm", Type: "bind", Source: storage.GuestShm, Options: []string{"rbind", "rprivate", "rw"}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	mounts := []specs.Mount{{Destination: "/dev/shm", Type: "tmpfs"}}
	if got := (&Sandbox{}).addFiles(&specs.Spec{Mounts: mounts}); len(got) != 1 || got[0].Type != "tmpfs" {
		t.Errorf("without files %v", got)
	}
}

func TestShmSize(t *testing.T) {
	shm := func(kind, source string, options ...string) *specs.Spec {
		return &specs.Spec{Mounts: []specs.Mount{{Destination: "/dev/shm", Type: kind, Source: source, Options: options}}}
	}
	for name, tt := range map[string]struct {
		spec *specs.Spec
		want uint64
	}{
		"none":         {&specs.Spec{}, 64 << 20},
		"option":       {shm("tmpfs", "shm", "nosuid", "size=65536k"), 64 << 20},
		"bytes":        {shm("tmpfs", "shm", "size=1048576"), 1 << 20},
		"gigabytes":    {shm("tmpfs", "shm", "size=2G"), 2 << 30},
		"nonsense":     {shm("tmpfs", "shm", "size=50%"), 64 << 20},
		"not a tmpfs":  {shm("bind", "/"), 64 << 20},
		"missing":      {shm("bind", "/nonexistent"), 64 << 20},
		"host's, bind": {shm("bind", "/dev/shm"), 64 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			if got := shmSize(tt.spec); got != tt.want {
				t.Errorf("%d, want %d", got, tt.want)
			}
		})
	}
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("shm", dir, "tmpfs", 0, "size=3m"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	if got := shmSize(shm("bind", dir, "rbind")); got != 3<<20 {
		t.Errorf("of a mount %d, want %d", got, 3<<20)
	}
}

// A growing machine changes its size.
type growing struct {
	Machine
	cpus, memory []int
	fails        error
}

func (*growing) Done() <-chan struct{} { return nil }

func (g *growing) ResizeCPUs(_ context.Context, n int) (int, error) {
	g.cpus = append(g.cpus, n)
	return n, g.fails
}

func (g *growing) ResizeMemory(_ context.Context, mib int) (hypervisor.Memory, error) {
	g.memory = append(g.memory, mib)
	return hypervisor.Memory{MiB: mib}, g.fails
}

func TestFit(t *testing.T) {
	host := hostCapacity()
	if host.CPUs < 2 || host.MemoryMiB < 700 {
		need.Missing(t, "needs two CPUs and 700 MiB of memory: this host has %d and %d", host.CPUs, host.MemoryMiB)
	}
	g := &growing{}
	s, err := New(Options{
		ID: "s", Dir: "/nonexistent", Pod: true, Config: Config{Machine: hypervisor.Spec{VCPUs: 1, MemoryMiB: 256}},
		StartVM: func(context.Context, hypervisor.Spec, VMOptions) (Machine, error) { return nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	s.machine, s.agent = g, agent.New(agent.Settings{}) // which does not answer
	s.state.state.VCPUs, s.state.state.MemoryMiB = 1, 256
	const m = 1 << 20
	s.setLimits("a", &limits{MemoryBytes: 100 * m})
	s.fit(t.Context())
	s.setLimits("b", &limits{MemoryBytes: 30 * m, HugeBytes: 20 * m}) // which updates say nothing of
	s.fit(t.Context())
	s.fit(t.Context()) // nothing changed
	limit := int64(200 * m)
	update := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	s.raiseLimits("b", update)
	s.fit(t.Context())
	s.replaceLimits("b", update)
	s.setLimits("a", nil)
	s.fit(t.Context())
	if d := cmp.Diff([]int{356, 406, 576, 476}, g.memory); d != "" {
		t.Error(d)
	}
	if g.cpus != nil {
		t.Errorf("CPUs were resized to %v", g.cpus)
	}
	limit = 400 * m
	if err := errors.Join(s.Update(t.Context(), update), s.Update(t.Context(), &specs.LinuxResources{})); err != nil {
		t.Error(err)
	}
	limit = 100 * m // less than that of the containers
	if err := s.Update(t.Context(), update); err != nil {
		t.Error(err)
	}
	if d := cmp.Diff([]int{676, 476}, g.memory[4:]); d != "" {
		t.Error(d)
	}
	s.setLimits("b", &limits{CPUs: 2, MemoryBytes: 200 * m})
	s.fit(t.Context())
	if d := cmp.Diff([]int{2}, g.cpus); d != "" {
		t.Error(d)
	}
}

func TestRoomToGrow(t *testing.T) {
	got := roomToGrow(hypervisor.Spec{VCPUs: 1, MaxVCPUs: 16, MemoryMiB: 256, MaxMemoryMiB: 256}, capacity{CPUs: 8, MemoryMiB: 4096})
	if got.MaxVCPUs != 16 || got.MaxMemoryMiB != 4096 {
		t.Errorf("%+v", got)
	}
}
