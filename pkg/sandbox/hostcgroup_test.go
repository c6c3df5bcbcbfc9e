package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/internal/need"
)

func TestCgroupPath(t *testing.T) {
	for in, want := range map[string]string{
		"":                                     "",
		"/":                                    "",
		"/default/c1":                          "/default/c1",
		"default/c1":                           "/default/c1",
		"/default/../../c1":                    "/c1",
		"/a:b":                                 "/a:b",
		"system.slice:cri-containerd:abc":      "/system.slice/cri-containerd-abc.scope",
		":nerdctl:abc":                         "/system.slice/nerdctl-abc.scope",
		"user.slice::abc":                      "/user.slice/abc.scope",
		"-.slice:cri:abc":                      "/cri-abc.scope",
		"kubepods-burstable-pod1.slice:cri:ab": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-ab.scope",
		"kubepods.slice:cri:a.slice":           "/kubepods.slice/a.slice",
	} {
		if got, err := cgroupPath(in); got != want || err != nil {
			t.Errorf("%q: got %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"a:b:c", "a/b.slice:c:d", ".slice:c:d", "a--b.slice:c:d", "-a.slice:c:d", "a.slice:b:", "a.slice:b:../c", "a.slice:../b:c"} {
		if got, err := cgroupPath(in); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
}

func TestHostLimits(t *testing.T) {
	in := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: new(int64(64 << 20)), Swap: new(int64(64 << 20))},
		CPU:    &specs.LinuxCPU{Shares: new(uint64(2)), Quota: new(int64(1000)), Period: new(uint64(100000)), Cpus: "0"},
		Pids:   &specs.LinuxPids{Limit: new(int64(1))},
	}
	out := hostLimits(in, 320)
	if got := *out.Memory.Limit >> 20; got < 320+1024 {
		t.Errorf("a machine of 320 MiB has %d", got)
	}
	if out.Pids != nil || out.CPU.Quota != nil || out.Memory.Swap != nil || *out.CPU.Shares != 2 || out.CPU.Cpus != "0" {
		t.Errorf("limits %+v", out)
	}
	for _, limit := range []int64{-1, 0, 1<<63 - 4096} {
		if out := hostLimits(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}, 256); out.Memory.Limit != nil {
			t.Errorf("%d: limit %d", limit, *out.Memory.Limit)
		}
	}
}

// TestRootCgroup runs in a process of its own: it moves into the group.
func TestRootCgroup(t *testing.T) {
	need.Root(t)
	if cgroupVersion() == 0 {
		need.Missing(t, "needs control groups: mount them on /sys/fs/cgroup")
	}
	const inner = "VMSHIM_TEST_CGROUP"
	if os.Getenv(inner) == "" {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestRootCgroup$", "-test.v")
		cmd.Env = append(os.Environ(), inner+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	own := func() string {
		b, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	e := newEnv(t)
	home := own()
	spec := testSpec()
	name := fmt.Sprintf("vmshim-test-%d", os.Getpid())
	spec.Linux.CgroupsPath = "/" + name + "/sb"
	t.Cleanup(func() {
		for _, dir := range cgroupDirs(CgroupState{Version: cgroupVersion(), Path: name}) {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		}
	})
	spec.Linux.Resources = &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: new(int64(64 << 20))}, CPU: &specs.LinuxCPU{Shares: new(uint64(512))},
	}
	s := e.sandbox()
	if err := s.Start(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	c := e.container(s, "c1")
	if n := strings.Count(own(), spec.Linux.CgroupsPath); n == 0 {
		t.Errorf("this process is in %s", own())
	}
	for _, pid := range []int{e.machine().proc.PID, c.PID()} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil || !strings.Contains(string(b), spec.Linux.CgroupsPath) {
			t.Errorf("process %d is in %s: %v", pid, b, err)
		}
	}
	st, err := ReadState(e.opts.Dir)
	if err != nil || st.Cgroup == nil || st.Cgroup.Path != spec.Linux.CgroupsPath {
		t.Errorf("state has %+v: %v", st.Cgroup, err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if got := own(); got != home {
		t.Errorf("this process is in %s, and was in %s", got, home)
	}
	for _, dir := range cgroupDirs(*st.Cgroup) {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
	e.clean()
}

// TestRootCgroupUnified clones a process into a group of version 2.
func TestRootCgroupUnified(t *testing.T) {
	need.Root(t)
	root := cgroupRoot
	if cgroupVersion() != 2 {
		if root = filepath.Join(cgroupRoot, "unified"); cgroupVersion() == 0 {
			need.Missing(t, "needs control groups: mount them on /sys/fs/cgroup")
		}
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		need.Missing(t, "needs a cgroup2 mount: mount one on /sys/fs/cgroup/unified")
	}
	name := fmt.Sprintf("/vmshim-test2-%d", os.Getpid())
	g, err := makeUnified(root, name, &specs.LinuxResources{})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: g.fd()}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid)); err != nil || !strings.Contains(string(b), "0::"+name+"\n") {
		t.Errorf("process is in %s: %v", b, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := removeDir(ctx, filepath.Join(root, name)); err == nil {
		t.Error("a group in use was removed")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err := g.leave(); err != nil {
		t.Error(err)
	}
	if err := removeDir(t.Context(), filepath.Join(root, name)); err != nil {
		t.Error(err)
	}
}
