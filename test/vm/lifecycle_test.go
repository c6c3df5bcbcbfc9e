package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// ended waits for a machine's end and gives the reason.
func ended(t *testing.T, m *vmtest.Machine, within time.Duration) error {
	t.Helper()
	select {
	case <-m.Done():
		return m.Err()
	case <-time.After(within):
		t.Fatalf("machine lives on after %v", within)
		return nil
	}
}

func lacks(t *testing.T, err error, texts ...string) {
	t.Helper()
	if err == nil || !errdefs.IsUnavailable(err) {
		t.Errorf("error %v is not unavailable", err)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q lacks %q", err, text)
		}
	}
	if strings.ContainsAny(err.Error(), "\r\n\x1b") {
		t.Errorf("error %q is not one clean line", err)
	}
}

// TestVMSilentAgent has an agent that can't say that it serves, and a host that
// asks all the time while the guest boots: vhost-device-vsock survives that.
func TestVMSilentAgent(t *testing.T) {
	m := vmtest.Start(t)
	if path, hybrid := strings.CutPrefix(m.AgentURL(extension.AgentPort), "hvsock://"); hybrid {
		path, _, _ = strings.Cut(path, ":")
		if err := os.Remove(path + "_3"); err != nil { // where vhost-device-vsock passes on what the guest says
			t.Fatal(err)
		}
	}
	early := 0
	for ctx := vmtest.Context(t); ; early++ {
		one, cancel := context.WithTimeout(ctx, vmtest.Within(time.Second))
		conn, err := m.Dial(one, extension.AgentPort)
		cancel()
		if err == nil {
			defer conn.Close()
			client := ttrpc.NewClient(conn)
			defer client.Close()
			if _, err := protocol.NewHealthClient(client).Check(ctx, &protocol.CheckRequest{}); err != nil {
				t.Errorf("check: %v", err)
			}
			break
		}
		if err := ctx.Err(); err != nil {
			t.Fatalf("%v after %d attempts", err, early)
		}
	}
	if early == 0 {
		t.Error("the guest answered before it booted")
	}
}

func signalRole(tb testing.TB, m *vmtest.Machine, role string, sig syscall.Signal) {
	tb.Helper()
	for _, p := range m.Processes() {
		if p.Role == role {
			if err := syscall.Kill(p.PID, sig); err != nil {
				tb.Fatal(err)
			}
			return
		}
	}
	tb.Fatalf("no %s among %v", role, m.Processes())
}

// A guest boots with everything that a machine can have, and powers off when
// its agent is told to.
func TestVMBootsAndPowersOff(t *testing.T) {
	m := vmtest.Boot(t, withDisk(t))
	t.Logf("ready after %v", time.Since(m.Started))

	conn, err := m.Dial(vmtest.Context(t), extension.AgentPort)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	ctx := vmtest.Context(t)
	if _, err := protocol.NewAgentServiceClient(client).DestroySandbox(ctx, &protocol.DestroySandboxRequest{}); err != nil {
		t.Errorf("destroy sandbox: %v", err)
	}
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, vmtest.Within(20*time.Second))
	defer cancel()
	if err := m.Shutdown(ctx); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	t.Logf("off after %v", time.Since(start))
	if ctx.Err() != nil {
		t.Error("the guest did not power off by itself")
	}
	if m.Err() != nil {
		t.Errorf("error after shutdown: %v", m.Err())
	}
}

func withDisk(t *testing.T) func(*hypervisor.Spec) {
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return func(s *hypervisor.Spec) {
		s.Disks = []hypervisor.Disk{{ID: "data", Path: path}, {ID: "ro", Path: path, ReadOnly: true}}
	}
}

// A port where nobody listens refuses; the context bounds what hangs.
func TestVMDialNobody(t *testing.T) {
	m := vmtest.Resume(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := m.Dial(ctx, 4711)
	if err == nil {
		conn.Close()
		t.Fatal("somebody is there")
	}
	if errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hung: %v", err)
	}
}

// A guest that stands still is not gone: who dials it waits as long as he wants,
// which is longer than the kernel does.
func TestVMDialStopped(t *testing.T) {
	m := boot(t)
	signalRole(t, m.Machine, "qemu", unix.SIGSTOP)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	conn, err := m.Dial(ctx, extension.AgentPort)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v while the guest stands still, want %v", err, context.DeadlineExceeded)
	}
	if err == nil {
		conn.Close()
	}
	signalRole(t, m.Machine, "qemu", unix.SIGCONT)
	if conn, err = m.Dial(m.ctx(), extension.AgentPort); err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestVMKilled(t *testing.T) {
	t.Run("qemu at once", func(t *testing.T) {
		m := vmtest.Start(t)
		signalRole(t, m, "qemu", syscall.SIGKILL)
		lacks(t, ended(t, m, 5*time.Second), "before its agent was ready: qemu ended: signal: killed")
	})
	t.Run("qemu during boot", func(t *testing.T) {
		m := vmtest.Start(t)
		time.Sleep(500 * time.Millisecond)
		signalRole(t, m, "qemu", syscall.SIGKILL)
		lacks(t, ended(t, m, 5*time.Second), "qemu ended: signal: killed")
	})
	for _, role := range []string{"qemu", "virtiofsd", "vhost-device-vsock"} {
		t.Run(role+" after boot", func(t *testing.T) {
			m := vmtest.Resume(t)
			if role == "vhost-device-vsock" && len(m.Processes()) < 3 {
				t.Skip("the kernel carries vsock here")
			}
			conn, err := m.Dial(vmtest.Context(t), extension.AgentPort)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			start := time.Now()
			signalRole(t, m, role, syscall.SIGKILL)
			if _, err := conn.Read(make([]byte, 1)); err == nil {
				t.Error("the dead speak")
			}
			lacks(t, ended(t, m, 5*time.Second), role+" ended: signal: killed")
			t.Logf("gone after %v", time.Since(start))
			if strings.Contains(m.Err().Error(), "before its agent") {
				t.Errorf("error %q: the agent was ready", m.Err())
			}
		})
	}
	t.Run("by its owner", func(t *testing.T) {
		m := vmtest.Resume(t)
		if err := m.Kill(); err != nil || m.Err() != nil {
			t.Errorf("kill: %v, %v", err, m.Err())
		}
	})
}

// A kernel that panics is an error with its last words, at once.
func TestVMKernelPanics(t *testing.T) {
	m := vmtest.Start(t, func(s *hypervisor.Spec) {
		s.KernelParams = append(s.KernelParams, "rdinit=/no/such/init", "root=/dev/none")
	})
	err := ended(t, m, vmtest.Timeout)
	lacks(t, err, "guest kernel panicked", "Kernel panic - not syncing")
	if full := fmt.Sprintf("%+v", err); !strings.Contains(full, "-append") {
		t.Errorf("no command line in %s", full)
	}
}

func TestVMWrongKernel(t *testing.T) {
	vmtest.Need(t, vmtest.Root, vmtest.QEMU, vmtest.Share, vmtest.Image)
	start := func(kernel string) error {
		s := vmtest.Spec(t)
		s.Kernel = kernel
		vm, err := qemu.Start(vmtest.Context(t), s, vmtest.Options(t))
		if err == nil {
			_ = vm.Kill()
		}
		return err
	}
	if err := start("/no/vmlinux"); !errdefs.IsNotFound(err) {
		t.Errorf("missing kernel: %v", err)
	}
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("not a kernel\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	lacks(t, start(text), "qemu: linux kernel too old", "qemu ended: exit status 1")
}

// Cancel anywhere in the first second leaves nothing.
func TestVMCancelStart(t *testing.T) {
	vmtest.Need(t, vmtest.Root, vmtest.QEMU, vmtest.Share, vmtest.Image)
	for wait := time.Duration(0); wait < 200*time.Millisecond; wait += 10 * time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		vm, err := qemu.Start(ctx, vmtest.Spec(t), vmtest.Options(t))
		if err == nil {
			_ = vm.Kill()
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: %v", wait, err)
		}
		cancel()
	}
}
