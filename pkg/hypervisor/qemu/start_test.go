package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

func leftGoroutines() error {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(stack, "hypervisor/qemu.") && !strings.Contains(stack, "leakless") {
			return fmt.Errorf("goroutine: %s", stack)
		}
	}
	return nil
}

// behaviour of the programs of a machine; empty is "serve".
type behaviour struct{ qemu, vsock, virtiofsd string }

func (b behaviour) env() []string {
	or := func(s string) string {
		if s == "" {
			return "serve"
		}
		return s
	}
	return []string{"GORACE=atexit_sleep_ms=0", fakeQEMU + "=" + or(b.qemu), fakeVsock + "=" + or(b.vsock), fakeVirtiofsd + "=" + or(b.virtiofsd)}
}

func fakeMachine(t testing.TB, b behaviour) (hypervisor.Spec, Options) {
	t.Helper()
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, []byte("image"), 0o644); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	s := spec(runtime.GOARCH, func(s *hypervisor.Spec) {
		s.Name, s.Kernel, s.Initrd = t.Name(), image, image
		s.Shares = []hypervisor.Share{{Tag: "share", Dir: dir}}
	})
	opts := Options{
		Config: Config{UIDBase: 2000000000},
		Host: &Host{
			Arch: runtime.GOARCH, QEMU: self, Machine: "q35", Accelerator: TCG, Vsock: VsockVhostUser,
			VhostDeviceVsock: self, Virtiofsd: self, VirtiofsdDialect: DialectC,
		},
		Dir: state,
		Env: b.env(),
	}
	t.Cleanup(func() { checkEmpty(t, state) })
	return s, opts
}

func checkEmpty(t testing.TB, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		t.Errorf("left behind: %s", filepath.Join(dir, e.Name()))
	}
}

// within bounds what must not hang.
func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func startFake(t testing.TB, b behaviour) *VM {
	t.Helper()
	s, opts := fakeMachine(t, b)
	vm, err := Start(within(t), s, opts)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { _ = vm.Kill() })
	return vm
}

func await(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatalf("no %s", what)
	}
}

func TestMachine(t *testing.T) {
	vm := startFake(t, behaviour{qemu: "ring"})
	await(t, "ready", vm.Ready())

	var roles []string
	for _, p := range vm.Processes() {
		roles = append(roles, p.Role)
		if p.StartTime == 0 || p.StartTime != startTime(p.PID) {
			t.Errorf("%s: start time %d", p.Role, p.StartTime)
		}
	}
	if want := []string{roleVirtiofsd, roleVsock, roleQEMU}; !slices.Equal(roles, want) {
		t.Errorf("processes %q, want %q", roles, want)
	}
	if want := "hvsock://" + vm.opts.Dir + "/v/g:1024"; vm.AgentURL(1024) != want {
		t.Errorf("url %s, want %s", vm.AgentURL(1024), want)
	}

	conn, err := vm.Dial(within(t), 1024)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Error(err)
	}
	echo := make([]byte, 5)
	if _, err := io.ReadFull(conn, echo); err != nil || string(echo) != "hello" {
		t.Errorf("echo %q, %v", echo, err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := vm.Shutdown(ctx); err != nil { // the fake guest obeys ACPI
		t.Error(err)
	}
	await(t, "end", vm.Done())
	if vm.Err() != nil {
		t.Errorf("error after shutdown: %v", vm.Err())
	}
	checkEmpty(t, vm.opts.Dir)
	if _, err := vm.Dial(within(t), 1024); !errdefs.IsUnavailable(err) {
		t.Errorf("dial after the end: %v", err)
	}
}

func TestShutdownKillsInTheEnd(t *testing.T) {
	vm := startFake(t, behaviour{qemu: "deaf"})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := vm.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	await(t, "end", vm.Done())
	if vm.Err() != nil {
		t.Errorf("error after shutdown: %v", vm.Err())
	}
}

func TestStartFails(t *testing.T) {
	tests := []struct {
		name string
		b    behaviour
		want []string
	}{
		{"qemu exits", behaviour{qemu: "exit"}, []string{"qemu ended: exit status 1", `: could not set up host forwarding rule\x1b[31m`}},
		{"qemu exits after its greeting", behaviour{qemu: "bye"}, []string{"qemu ended: exit status 0"}},
		{"vhost-device-vsock exits", behaviour{vsock: "exit"}, []string{"vhost-device-vsock ended: exit status 1", "no such luck"}},
		{"virtiofsd exits", behaviour{qemu: "mute", virtiofsd: "exit"}, []string{"virtiofsd ended: exit status 1", "no share today"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, opts := fakeMachine(t, tt.b)
			vm, err := Start(within(t), s, opts)
			if err == nil {
				_ = vm.Kill()
				t.Fatal("started")
			}
			if !errdefs.IsUnavailable(err) {
				t.Errorf("%v is not unavailable", err)
			}
			for _, text := range tt.want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("error %q lacks %q", err, text)
				}
			}
			if strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("error %q is not one clean line", err)
			}
			var exit *ExitError
			if !errors.As(err, &exit) || strings.HasPrefix(tt.want[0], "qemu") && !strings.Contains(fmt.Sprintf("%+v", exit), "-sandbox") {
				t.Errorf("no command line in %+v", exit)
			}
		})
	}
}

func TestStartRefuses(t *testing.T) {
	tests := []struct {
		name   string
		change func(*hypervisor.Spec, *Options)
		is     func(error) bool
		want   string
	}{
		{"kernel missing", func(s *hypervisor.Spec, _ *Options) { s.Kernel = "/no/vmlinux" }, errdefs.IsNotFound, "kernel: open /no/vmlinux"},
		{"initrd empty", func(s *hypervisor.Spec, _ *Options) { s.Initrd = "/dev/null" }, errdefs.IsInvalidArgument, "initrd: /dev/null is not a regular file"},
		{"disk missing", func(s *hypervisor.Spec, _ *Options) {
			s.Disks = []hypervisor.Disk{{ID: "a", Path: "/no/disk"}}
		}, errdefs.IsNotFound, "disk a: open /no/disk"},
		{"disk is a device of characters", func(s *hypervisor.Spec, _ *Options) {
			s.Disks = []hypervisor.Disk{{ID: "a", Path: "/dev/zero"}}
		}, errdefs.IsInvalidArgument, "neither a file nor a block device"},
		{"faults of the description", func(s *hypervisor.Spec, o *Options) {
			s.VCPUs, o.Dir, o.Config.Vsock = 0, "here", "smoke"
		}, errdefs.IsInvalidArgument, "0 vCPUs"},
		{"too many parameters", func(s *hypervisor.Spec, _ *Options) {
			s.KernelParams = []string{strings.Repeat("x", 2000)}
		}, errdefs.IsInvalidArgument, "bytes of kernel parameters"},
		{"wrong architecture", func(s *hypervisor.Spec, o *Options) { o.Host.Arch = "m68k" }, errdefs.IsInvalidArgument, "on a host of m68k"},
		{"no virtiofsd", func(_ *hypervisor.Spec, o *Options) { o.Host.Virtiofsd = "" }, errdefs.IsFailedPrecondition, "install virtiofsd"},
		{"no qemu", func(_ *hypervisor.Spec, o *Options) { o.Host.QEMU = "/no/qemu" }, nil, "start qemu: fork/exec /no/qemu: no such file"},
		{"no record", func(_ *hypervisor.Spec, o *Options) {
			o.Started = func(hypervisor.Process) error { return errors.New("disk full") }
		}, nil, "record virtiofsd: disk full"},
		{"no record of qemu", func(_ *hypervisor.Spec, o *Options) {
			o.Started = func(p hypervisor.Process) error {
				if p.Role == roleQEMU {
					return errors.New("disk full")
				}
				return nil
			}
		}, nil, "record qemu: disk full"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, opts := fakeMachine(t, behaviour{})
			tt.change(&s, &opts)
			vm, err := Start(within(t), s, opts)
			if err == nil {
				_ = vm.Kill()
				t.Fatal("started")
			}
			if tt.is != nil && !tt.is(err) {
				t.Errorf("class of %v", err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q lacks %q", err, tt.want)
			}
		})
	}
}

// A cancel at any step leaves nothing: TestMain looks for processes,
// goroutines and descriptors, fakeMachine for files.
func TestCancelStart(t *testing.T) {
	stuck := errors.New("had enough")
	steps := map[string]behaviour{
		roleVirtiofsd: {}, roleVsock: {}, roleQEMU: {}, // right after the start of each
		"no vsock socket": {vsock: "never"}, "no greeting": {qemu: "mute"}, "no negotiation": {qemu: "greet"},
	}
	for step, b := range steps {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			s, opts := fakeMachine(t, b)
			ctx, cancel := context.WithCancelCause(within(t))
			opts.Started = func(p hypervisor.Process) error {
				if p.Role == step {
					cancel(stuck)
				} else if len(b.env()) > 0 && (b.vsock == "never" && p.Role == roleVsock || b.qemu != "" && p.Role == roleQEMU) {
					time.AfterFunc(100*time.Millisecond, func() { cancel(stuck) })
				}
				return nil
			}
			if vm, err := Start(ctx, s, opts); !errors.Is(err, stuck) {
				if err == nil {
					_ = vm.Kill()
				}
				t.Errorf("error %v, want the cause of the cancel", err)
			}
		})
	}
	t.Run("any time", func(t *testing.T) {
		for range 20 {
			s, opts := fakeMachine(t, behaviour{})
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(int(150*time.Millisecond))))
			if vm, err := Start(ctx, s, opts); err == nil {
				if err := vm.Kill(); err != nil || vm.Err() != nil {
					t.Errorf("kill: %v, %v", err, vm.Err())
				}
			} else if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v", err)
			}
			cancel()
		}
	})
}

func TestDeath(t *testing.T) {
	kill := func(role string) func(*testing.T, *VM) {
		return func(t *testing.T, vm *VM) {
			for _, p := range vm.Processes() {
				if p.Role == role {
					if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
						t.Error(err)
					}
				}
			}
		}
	}
	tests := []struct {
		name string
		b    behaviour
		act  func(*testing.T, *VM)
		want []string
	}{
		{"qemu killed", behaviour{qemu: "deaf"}, kill(roleQEMU), []string{"before its agent was ready: qemu ended: signal: killed"}},
		{"qemu killed after ready", behaviour{qemu: "ring"}, func(t *testing.T, vm *VM) {
			await(t, "ready", vm.Ready())
			kill(roleQEMU)(t, vm)
		}, []string{"ended: qemu ended: signal: killed"}},
		{"virtiofsd killed", behaviour{}, kill(roleVirtiofsd), []string{"virtiofsd ended: signal: killed"}},
		{"vhost-device-vsock killed", behaviour{}, kill(roleVsock), []string{"vhost-device-vsock ended: signal: killed"}},
		{"guest kernel panics", behaviour{qemu: "reset"}, nil, []string{"guest kernel panicked", `console: Kernel panic - not syncing: \x1b[31mboo`}},
		{"guest powers off", behaviour{qemu: "poweroff"}, nil, []string{"guest powered off", "console: last words"}},
		{"qmp is no qmp", behaviour{qemu: "garbage"}, nil, []string{"qmp connection ended: line"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, opts := fakeMachine(t, tt.b)
			vm, err := Start(within(t), s, opts)
			if err == nil {
				if tt.act != nil {
					tt.act(t, vm)
				}
				await(t, "end", vm.Done())
				err = vm.Err()
			}
			if err == nil || !errdefs.IsUnavailable(err) {
				t.Fatalf("error %v", err)
			}
			for _, text := range tt.want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("error %q lacks %q", err, text)
				}
			}
			if strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("error %q is not one clean line", err)
			}
		})
	}
}

// Whoever dials when the machine dies is told at once, also before the guest has
// rung.
func TestDeathEndsDial(t *testing.T) {
	for _, qemu := range []string{"deaf", "ring"} {
		t.Run(qemu, func(t *testing.T) {
			vm := startFake(t, behaviour{qemu: qemu})
			if qemu == "ring" {
				await(t, "ready", vm.Ready())
			}
			var dial sync.WaitGroup
			dial.Go(func() {
				conn, err := vm.Dial(within(t), 666) // accepted, never answered
				if err == nil {
					conn.Close()
				}
				if !errdefs.IsUnavailable(err) {
					t.Errorf("dial: %v", err)
				}
			})
			time.Sleep(20 * time.Millisecond)
			_ = vm.Kill()
			dial.Wait()
		})
	}
}

func TestQEMURunsAsNobody(t *testing.T) {
	need.Root(t)
	vm := startFake(t, behaviour{})
	want := fmt.Sprintf("%d", 2000000000+os.Getpid())
	for _, p := range vm.Processes() {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
		if err != nil {
			t.Fatal(err)
		}
		field := func(name string) []string {
			for line := range strings.Lines(string(status)) {
				if value, ok := strings.CutPrefix(line, name+":"); ok {
					return strings.Fields(value)
				}
			}
			return nil
		}
		if p.Role == roleVirtiofsd {
			continue // root in namespaces of its own
		}
		if uid, gid := field("Uid"), field("Gid"); !slices.Equal(uid, []string{want, want, want, want}) || !slices.Equal(uid, gid) {
			t.Errorf("%s: uid %q, gid %q, want %s", p.Role, uid, gid, want)
		}
		if groups := field("Groups"); len(groups) > 0 {
			t.Errorf("%s: groups %q", p.Role, groups)
		}
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb"} {
			if caps := field(set); !slices.Equal(caps, []string{"0000000000000000"}) {
				t.Errorf("%s: %s %q", p.Role, set, caps)
			}
		}
		ours, _ := os.Readlink("/proc/self/ns/net")
		if theirs, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.PID)); theirs == ours {
			t.Errorf("%s is in the host's network", p.Role)
		}
	}
}

// Every process is born in the control group: memory that it takes before it
// could be moved would stay with its parent's.
func TestBornInCgroup(t *testing.T) {
	need.Root(t)
	root := ""
	for _, path := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(path, "cgroup.controllers")); err == nil {
			root = path
		}
	}
	if root == "" {
		need.Missing(t, "needs cgroup v2, mounted")
	}
	name := fmt.Sprintf("vmshim-test-%d", os.Getpid())
	dir := filepath.Join(root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		need.Missing(t, "%v", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	group, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	s, opts := fakeMachine(t, behaviour{})
	opts.CgroupFD = int(group.Fd())
	opts.Started = func(p hypervisor.Process) error {
		member, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
		if !strings.Contains(string(member), "0::/"+name+"\n") {
			t.Errorf("%s is in %q, %v", p.Role, member, err)
		}
		return nil
	}
	vm, err := Start(within(t), s, opts)
	if err != nil {
		t.Fatal(err)
	}
	_ = vm.Kill()
}

func TestDoorbell(t *testing.T) {
	dir := t.TempDir()
	l, err := listenUnix(filepath.Join(dir, "bell"))
	if err != nil {
		t.Fatal(err)
	}
	strangers := 3
	d := newDoorbell(l, func(net.Addr) bool { strangers--; return strangers < 0 })
	var served sync.WaitGroup
	served.Go(d.serve)
	for range 3 {
		call(t, l.Addr()).Close()
	}
	select {
	case <-d.rung:
		t.Fatal("rang for a stranger")
	case <-time.After(50 * time.Millisecond):
	}
	call(t, l.Addr()).Close()
	await(t, "ring", d.rung)
	served.Wait()
	if _, err := net.Dial("unix", l.Addr().String()); err == nil {
		t.Error("still listens")
	}
	checkEmpty(t, dir)
}

func call(t *testing.T, addr net.Addr) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	return conn
}
