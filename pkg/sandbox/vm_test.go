package sandbox

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// A realVM is a sandbox in a real machine.
type realVM struct {
	*Sandbox
	t   *testing.T
	dir string
}

func bootVM(t *testing.T) *realVM {
	t.Helper()
	vmtest.Need(t, vmtest.Root, vmtest.QEMU, vmtest.Share, vmtest.Image)
	dir, err := os.MkdirTemp("", "vmsb") //nolint:usetesting // sockets are below it, whose paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Errorf("something is left: %v", err)
		}
	})
	base := vmtest.Spec(t)
	base.Name, base.Shares = "", nil
	s, err := New(Options{
		ID: "sb", Namespace: "ns", Dir: Dir(dir, "", "ns", "sb"),
		Config: Config{Machine: base, StartTimeout: vmtest.Timeout},
		StartVM: func(ctx context.Context, spec hypervisor.Spec, opts VMOptions) (Machine, error) {
			host, err := qemu.Probe(ctx, vmtest.Config())
			if err != nil {
				return nil, err
			}
			vm, err := qemu.Start(ctx, spec, qemu.Options{
				Config: vmtest.Config(), Host: host, Dir: opts.Dir, Env: opts.Env, Started: opts.Started, CgroupFD: opts.CgroupFD,
			})
			if err != nil {
				return nil, err
			}
			return vm, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), testSpec()); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		if found, err := marked(s.opts.Dir); err != nil || len(found) > 0 {
			t.Errorf("processes left: %v %v", found, err)
		}
	})
	return &realVM{s, t, dir}
}

// bundle has a root file system of busybox.
func (vm *realVM) bundle(id string) ContainerConfig {
	vm.t.Helper()
	bundle := vm.t.TempDir()
	bin := filepath.Join(bundle, "rootfs", "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		vm.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "/bin/busybox", filepath.Join(bin, "busybox")).CombinedOutput(); err != nil {
		vm.t.Fatalf("%s: %v", out, err)
	}
	for _, applet := range []string{"sh", "cat", "sleep", "ls", "mount", "ps"} {
		if err := os.Symlink("busybox", filepath.Join(bin, applet)); err != nil {
			vm.t.Fatal(err)
		}
	}
	spec := testSpec()
	spec.Root.Path = "rootfs"
	spec.Process.Args = []string{"sh", "-c", "trap 'exit 7' TERM; while :; do sleep 1; done"}
	// As on Debian.
	spec.Process.ApparmorProfile = "docker-default"
	spec.Linux.CgroupsPath = ""
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}})
	return ContainerConfig{ID: id, Bundle: bundle, Spec: spec, Streams: agent.StreamSet{Stdout: true, Stderr: true}}
}

func (vm *realVM) run(cfg ContainerConfig) *Container {
	vm.t.Helper()
	c, err := vm.CreateContainer(vm.t.Context(), cfg)
	if err != nil {
		vm.t.Fatalf("%+v", err)
	}
	if err := c.Start(vm.t.Context()); err != nil {
		vm.t.Fatalf("%+v", err)
	}
	return c
}

// sh runs a script in a container, and returns what it wrote.
func (vm *realVM) sh(c *Container, script string) string {
	vm.t.Helper()
	id := fmt.Sprintf("exec%d", time.Now().UnixNano())
	process := &specs.Process{Args: []string{"sh", "-c", "exec 2>&1; " + script}, Env: []string{"PATH=/bin"}, Cwd: "/"}
	p, err := c.Exec(vm.t.Context(), ExecConfig{ID: id, Process: process, Streams: agent.StreamSet{Stdout: true}})
	if err != nil {
		vm.t.Fatal(err)
	}
	if err := p.Start(vm.t.Context()); err != nil {
		vm.t.Fatal(err)
	}
	out := readAll(vm.t, p.Stdout())
	ended(vm.t, "exec", p.Done())
	if err := p.Delete(vm.t.Context()); err != nil {
		vm.t.Error(err)
	}
	return strings.TrimSpace(out)
}

func (vm *realVM) is(c *Container, script, want string) {
	vm.t.Helper()
	if got := vm.sh(c, script); got != want {
		vm.t.Errorf("%s: %q, want %q", script, got, want)
	}
}

// becomes waits for something to be so, as long as a guest may know better.
func (vm *realVM) becomes(c *Container, script, want string) {
	vm.t.Helper()
	got := ""
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if got = vm.sh(c, script); got == want {
			return
		}
	}
	vm.t.Errorf("%s: %q, want %q", script, got, want)
}

func mountTmpfs(t *testing.T, dir, text string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestVMMounts sees from a guest what the mounts of a container are.
func TestVMMounts(t *testing.T) {
	src := t.TempDir()
	mountTmpfs(t, src, "")
	if err := unix.Mount("", src, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"rw", "ro", "rro", "slave", "private"} {
		mountTmpfs(t, filepath.Join(src, name, "sub"), name+"sub")
		if err := os.WriteFile(filepath.Join(src, name, "f"), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	vm := bootVM(t)
	cfg := vm.bundle("c1")
	bind := func(name string, options ...string) {
		cfg.Spec.Mounts = append(cfg.Spec.Mounts, specs.Mount{
			Destination: "/" + name, Type: "bind", Source: filepath.Join(src, name), Options: append(options, "rbind"),
		})
	}
	bind("rw")
	bind("ro", "ro")
	bind("rro", "rro")
	bind("slave", "rslave")
	bind("private", "rprivate")
	cfg.Spec.Mounts = append(cfg.Spec.Mounts,
		specs.Mount{Destination: "/one", Type: "bind", Source: filepath.Join(src, "ro", "f"), Options: []string{"bind", "ro"}},
		specs.Mount{Destination: "/overlay", Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + filepath.Join(src, "rw", "sub") + ":" + filepath.Join(src, "ro", "sub"), "ro",
		}},
		specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/nowhere", Options: []string{"rbind"}},
	)
	c := vm.run(cfg)

	var script, want []string
	for _, name := range []string{"rw", "ro", "rro", "slave", "private"} {
		script = append(script, fmt.Sprintf("cat /%[1]s/f; echo; cat /%[1]s/sub/f; echo", name))
		want = append(want, name, name+"sub")
	}
	script = append(script, "cat /one; echo; cat /overlay/f; echo")
	want = append(want, "ro", "rwsub")
	for _, w := range []struct {
		path    string
		refused bool
	}{
		{"/rw/new", false},
		{"/rw/sub/new", false},
		{"/ro/new", true},
		{"/ro/sub/new", false},
		{"/rro/new", true},
		{"/rro/sub/new", true},
		{"/one", true},
		{"/overlay/new", true},
		{"/dev/shm/new", false},
	} {
		script = append(script, fmt.Sprintf("(echo x >%s) && echo written", w.path))
		if w.refused {
			want = append(want, fmt.Sprintf("sh: can't create %s: Read-only file system", w.path))
		} else {
			want = append(want, "written")
		}
	}
	if diff := cmp.Diff(want, strings.Split(vm.sh(c, strings.Join(script, "; ")), "\n")); diff != "" {
		t.Errorf("in the guest (-want +got):\n%s", diff)
	}
	if b, err := os.ReadFile(filepath.Join(src, "rw", "new")); string(b) != "x\n" {
		t.Errorf("on the host: %q %v", b, err)
	}

	// Mounted on the host when the container runs.
	for _, name := range []string{"slave", "private"} {
		mountTmpfs(t, filepath.Join(src, name, "later"), name+"later")
	}
	vm.becomes(c, "cat /slave/later/f", "slavelater")
	vm.is(c, "cat /private/later/f", "cat: can't open '/private/later/f': No such file or directory")

	// A container that goes leaves nothing to the one that comes with its name.
	for i := range 2 {
		cfg := vm.bundle("again")
		if err := os.WriteFile(filepath.Join(cfg.Bundle, "rootfs", "who"), fmt.Append(nil, i), 0o644); err != nil {
			t.Fatal(err)
		}
		c := vm.run(cfg)
		vm.is(c, "cat /who", fmt.Sprint(i))
		if err := c.Kill(t.Context(), uint32(syscall.SIGKILL), false); err != nil {
			t.Error(err)
		}
		ended(t, "container", c.Init().Done())
		if err := c.Delete(t.Context()); err != nil {
			t.Error(err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), filepath.Join(vm.opts.Dir, "share", "again")) {
		t.Errorf("left: %v\n%s", err, mounts)
	}
	if entries, err := os.ReadDir(filepath.Join(vm.opts.Dir, "share")); err != nil || len(entries) != 1 {
		t.Errorf("share has %v: %v", entries, err)
	}
}

// TestVMContainerLife follows a container through a real guest.
func TestVMContainerLife(t *testing.T) {
	vm := bootVM(t)
	cfg := vm.bundle("c1")
	c := vm.run(cfg)
	pids, err := c.Pids(t.Context())
	if err != nil || len(pids) == 0 || pids[0].GetExecId() != "c1" {
		t.Errorf("pids %v %v", pids, err)
	}
	if stats, err := c.Stats(t.Context()); err != nil || stats.GetCgroupStats().GetMemoryStats().GetUsage().GetUsage() == 0 {
		t.Errorf("statistics %v %v", stats, err)
	}
	if err := c.Pause(t.Context()); err != nil {
		t.Error(err)
	}
	if err := c.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	if err := c.Update(t.Context(), &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: new(int64(50))}}); err != nil {
		t.Error(err)
	}
	vm.is(c, "cat /proc/1/cgroup >/dev/null && echo fine", "fine")
	if err := c.Kill(t.Context(), uint32(syscall.SIGTERM), false); err != nil {
		t.Error(err)
	}
	ended(t, "container", c.Init().Done())
	if got := c.Init().Exit().Code; got != 7 {
		t.Errorf("exit code %d", got)
	}
	if stats, err := c.Stats(t.Context()); err != nil || stats.GetCgroupStats().GetPidsStats().GetLimit() != 50 {
		t.Errorf("last statistics %v %v", stats, err)
	}
	if err := c.Delete(t.Context()); err != nil {
		t.Error(err)
	}

	// Created and never started: it can be killed, and deleted at once.
	for _, kill := range []bool{true, false} {
		c, err := vm.CreateContainer(t.Context(), vm.bundle("c2"))
		if err != nil {
			t.Fatal(err)
		}
		if kill {
			if err := c.Kill(t.Context(), uint32(syscall.SIGKILL), false); err != nil {
				t.Error(err)
			}
			ended(t, "container", c.Init().Done())
			fails(t, c.Start(t.Context()), nil)
		}
		if err := c.Delete(t.Context()); err != nil {
			t.Error(err)
		}
		ended(t, "container", c.Init().Done())
	}

	missing := vm.bundle("c3")
	missing.Spec.Process.Args = []string{"nosuch"}
	c, err = vm.CreateContainer(t.Context(), missing)
	if err == nil {
		err = c.Start(t.Context())
	}
	fails(t, err, nil, "nosuch", "not found")
	t.Log(err)
}
