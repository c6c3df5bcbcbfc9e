package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A shimSetup is what a process that owns a sandbox is told.
type shimSetup struct {
	Dir     string
	Machine hypervisor.Spec
	Config  ContainerConfig
}

// shimMain starts a sandbox whose machine is a process that sleeps, and then
// is there to be killed.
func shimMain(args []string) int {
	var setup shimSetup
	if err := json.Unmarshal([]byte(args[0]), &setup); err != nil {
		fmt.Println(err)
		return 1
	}
	opts := Options{ID: "sb", Namespace: "ns", Dir: setup.Dir, Config: Config{Machine: setup.Machine}}
	booting := make(chan struct{})
	opts.StartVM = func(ctx context.Context, _ hypervisor.Spec, vm VMOptions) (Machine, error) {
		// One that is recorded, and one that has only the mark.
		for _, started := range []func(hypervisor.Process) error{vm.Started, func(hypervisor.Process) error { return nil }} {
			cmd := exec.Command("sleep", "1000")
			cmd.Env = vm.Env
			if err := cmd.Start(); err != nil {
				return nil, err
			}
			p, err := processOf("qemu", cmd.Process.Pid)
			if err == nil {
				err = started(p)
			}
			if err != nil {
				return nil, err
			}
		}
		close(booting)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	s, err := New(opts)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	var g errgroup.Group
	g.Go(func() error { return s.Start(context.Background(), setup.Config.Spec) })
	g.Go(func() error {
		_, err := s.CreateContainer(context.Background(), setup.Config)
		return err
	})
	<-booting
	for !slices.ContainsFunc(s.state.snapshot().Timeline, func(p Phase) bool { return p.Name == PhaseHost }) {
		time.Sleep(time.Millisecond)
	}
	fmt.Println("up")
	fmt.Println(g.Wait())
	return 1
}

// crash runs a shim to where its machine boots and its container has all it
// gets on the host, and kills it.
func crash(t *testing.T, e *env, cfg ContainerConfig) {
	t.Helper()
	arg, err := json.Marshal(shimSetup{Dir: e.opts.Dir, Machine: e.opts.Config.Machine, Config: cfg})
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", "shim", string(arg))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if line != "up\n" {
		t.Fatalf("shim says %q", line)
	}
}

func TestRootReap(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, state string){
		"whole state":  func(*testing.T, string) {},
		"no state":     func(t *testing.T, state string) { remove(t, state) },
		"half a state": func(t *testing.T, state string) { truncate(t, state, 40) },
		"no bytes":     func(t *testing.T, state string) { truncate(t, state, 0) },
		"newer state": func(t *testing.T, state string) {
			if err := os.WriteFile(state, []byte(`{"version": 99}`), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			cfg := e.config("c1")
			stopped := filepath.Join(t.TempDir(), "stopped")
			cfg.Spec.Hooks = &specs.Hooks{
				CreateRuntime: []specs.Hook{{Path: "/bin/true"}},
				Poststop:      []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat >" + stopped}}},
			}
			b, err := json.Marshal(cfg.Spec)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(cfg.Bundle, "config.json"), b, 0o644); err != nil {
				t.Fatal(err)
			}
			crash(t, e, cfg)
			found, err := marked(e.opts.Dir)
			if err != nil || len(found) != 3 { // two of the machine, the task
				t.Fatalf("%d processes, want 3: %v", len(found), err)
			}
			spoil(t, filepath.Join(e.opts.Dir, stateName))
			start := time.Now()
			if err := Reap(t.Context(), e.opts.Dir); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
			e.clean()
			if name == "whole state" {
				var st specs.State
				b, err := os.ReadFile(stopped)
				if err == nil {
					err = json.Unmarshal(b, &st)
				}
				if err != nil || st.ID != "c1" || st.Status != specs.StateStopped {
					t.Errorf("poststop hook: %v %s", err, b)
				}
			}
			if _, err := os.Stat(filepath.Join(cfg.Bundle, "rootfs", "etc", "id")); err != nil {
				t.Errorf("root file system: %v", err)
			}
			if err := Reap(t.Context(), e.opts.Dir); err != nil {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// TestRootStartAfterCrash starts where another one was killed.
func TestRootStartAfterCrash(t *testing.T) {
	e := newEnv(t)
	crash(t, e, e.config("c1"))
	s := e.running()
	c := e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Error(err)
	}
	if found, err := marked(e.opts.Dir); err != nil || len(found) != 2 {
		t.Errorf("%d processes, want 2: %v", len(found), err)
	}
}

// TestRootReapOthers spares what is not the sandbox's: its state names a pid that
// is another process now, and the process that cleans up.
func TestRootReapOthers(t *testing.T) {
	need.Root(t)
	dir := filepath.Join(t.TempDir(), "0123456789abcdef")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// The pid is another one's now, or it is our own.
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := processOf("qemu", other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p.StartTime--
	self, err := processOf("shim", os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(State{Version: 1, Shim: self, Processes: []hypervisor.Process{p}})
	if err != nil {
		t.Fatal(err)
	}
	if err := replace(dir, b); err != nil {
		t.Fatal(err)
	}
	if err := Reap(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the other process: %v", err)
	}
	p.StartTime++
	if !alive(p) {
		t.Error("the other process is gone")
	}
	_ = other.Process.Kill()
	if err := other.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Error(err)
	}
	if alive(p) {
		t.Error("a process that was reaped is alive")
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func truncate(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}
