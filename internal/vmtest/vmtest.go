// Package vmtest boots machines for tests: the guest image from _output/guest
// through pkg/hypervisor/qemu.
//
// What a test needs and the host lacks makes it skip, saying how to get it;
// with VMSHIM_REQUIRE=1, as in CI, it makes it fail. VMSHIM_GUEST names another
// directory with vmlinux and initrd.img.
package vmtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// A Thing is what a test can need.
type Thing func() error

// The things.
var (
	Root  Thing = root
	Image Thing = image
	QEMU  Thing = func() error { _, err := host(); return err } // with vsock
	Share Thing = virtiofsd
	KVM   Thing = kvm
)

// Need skips the test, or fails it where nothing may be missing, unless all
// things are there. It skips what is slow in -short, always.
func Need(tb testing.TB, things ...Thing) {
	tb.Helper()
	if testing.Short() {
		tb.Skip("boots a machine")
	}
	for _, has := range things {
		if err := has(); err != nil {
			need.Missing(tb, "%v", err)
		}
	}
}

func root() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("needs root")
	}
	return nil
}

func image() error {
	for _, name := range []string{"vmlinux", "initrd.img"} {
		if _, err := os.Stat(filepath.Join(guestDir(), name)); err != nil {
			return fmt.Errorf("needs the guest image (make image): %w", err)
		}
	}
	return nil
}

func virtiofsd() error {
	h, err := host()
	if err == nil && h.Virtiofsd == "" {
		err = fmt.Errorf("needs virtiofsd: %s", strings.Join(h.Warnings, "; "))
	}
	return err
}

func kvm() error {
	h, err := host()
	if err == nil && h.Accelerator != qemu.KVM {
		err = fmt.Errorf("needs kvm: %s", strings.Join(h.Warnings, "; "))
	}
	return err
}

// Config is what machines of tests run with: what the host has, the cached
// vhost-device-vsock (hack/fetch-vhost-device-vsock), a user of their own.
func Config() qemu.Config {
	cfg := qemu.Config{UIDBase: 2000000000}
	if cache, err := os.UserCacheDir(); err == nil {
		path := filepath.Join(cache, "vmshim/vhost-device-vsock/vhost-device-vsock")
		if _, err := os.Stat(path); err == nil {
			cfg.VhostDeviceVsock = path
		}
	}
	if os.Getenv("VMSHIM_NO_KVM") == "1" {
		cfg.Accelerator = qemu.TCG
	}
	return cfg
}

// host is asked once: it takes seconds where the host is emulated.
var host = sync.OnceValues(func() (*qemu.Host, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) //nolint:forbidigo // outside a test's life
	defer cancel()
	return qemu.Probe(ctx, Config())
})

// Host is what machines of tests run on.
func Host(tb testing.TB) *qemu.Host {
	tb.Helper()
	h, err := host()
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

// guestDir is where the image is.
func guestDir() string {
	if dir := os.Getenv("VMSHIM_GUEST"); dir != "" {
		return dir
	}
	dir, err := os.Getwd()
	if err != nil {
		return ""
	}
	for ; dir != "/"; dir = filepath.Dir(dir) { // tests run in their package's directory
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
	}
	return filepath.Join(dir, "_output", "guest")
}

// TunedGuest is where the image with a kernel of our own is (make kernel), beside
// the other; empty: it was not built.
func TunedGuest() string {
	dir := filepath.Join(filepath.Dir(guestDir()), "guest-tuned")
	if _, err := os.Stat(filepath.Join(dir, "vmlinux")); err != nil {
		return ""
	}
	return dir
}

// Spec describes the machine of a test: the default of the product, with one
// share.
func Spec(tb testing.TB) hypervisor.Spec {
	tb.Helper()
	dir := guestDir()
	return hypervisor.Spec{
		Name: strings.ReplaceAll(tb.Name(), "/", "-"), Arch: runtime.GOARCH,
		VCPUs: 1, MaxVCPUs: 2, MemoryMiB: 256, MaxMemoryMiB: 1024,
		Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd.img"),
		Shares: []hypervisor.Share{{Tag: "kataShared", Dir: tb.TempDir()}},
	}
}

// Options to start it with. The directory must be empty in the end.
func Options(tb testing.TB) qemu.Options {
	tb.Helper()
	h := Host(tb)
	dir, err := os.MkdirTemp("", "vm") //nolint:usetesting // tb.TempDir has the test's name in it: too long for a socket
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			tb.Errorf("machine left something behind: %v", err)
			_ = os.RemoveAll(dir)
		}
	})
	return qemu.Options{Config: Config(), Host: h, Dir: dir, Env: []string{"VMSHIM_SANDBOX=" + dir}}
}

// A Machine is a running machine of a test.
type Machine struct {
	*qemu.VM
	Dial    vsock.Dialer
	Share   string // the directory of the host that the guest knows as kataShared
	Started time.Time
}

// Timeout bounds waits for a guest: generous, because a machine that is shared
// and emulates may take its time.
var Timeout = Within(90 * time.Second)

// Within is a limit of time for what takes a guest, or programs beside it, no
// longer than that where the host is not emulated.
func Within(limit time.Duration) time.Duration { return limit * time.Duration(Patience()) }

// Patience is how many times longer everything takes: kvmhost says so where the
// host of the machines is emulated, too.
func Patience() int {
	n, err := strconv.Atoi(os.Getenv("VMSHIM_PATIENCE"))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

// Context is the test's, with the Timeout.
func Context(tb testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(tb.Context(), Timeout)
	tb.Cleanup(cancel)
	return ctx
}

// Start starts a machine, after what is changed of its description. It is
// killed when the test ends; when the test has failed, what is needed to find
// out why is printed.
func Start(tb testing.TB, change ...func(*hypervisor.Spec)) *Machine {
	tb.Helper()
	Need(tb, Root, QEMU, Share, Image)
	return start(tb, changed(tb, change), Options(tb))
}

// changed is the description of a test's machine.
func changed(tb testing.TB, change []func(*hypervisor.Spec)) hypervisor.Spec {
	tb.Helper()
	spec := Spec(tb)
	for _, f := range change {
		f(&spec)
	}
	return spec
}

func start(tb testing.TB, spec hypervisor.Spec, opts qemu.Options) *Machine {
	tb.Helper()
	m := &Machine{Started: time.Now()}
	if len(spec.Shares) > 0 {
		m.Share = spec.Shares[0].Dir
	}
	vm, err := qemu.Start(Context(tb), spec, opts)
	if err != nil {
		tb.Fatalf("%+v", err)
	}
	m.VM, m.Dial = vm, vm.Dial
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("to reproduce: %q\nconsole: %s", vm.Cmdline(), vm.Console())
		}
		if err := vm.Kill(); err != nil {
			tb.Errorf("kill: %v", err)
		}
	})
	return m
}

// Boot starts a machine and waits for its agent.
func Boot(tb testing.TB, change ...func(*hypervisor.Spec)) *Machine {
	tb.Helper()
	m := Start(tb, change...)
	m.wait(tb)
	return m
}

// wait waits for the agent.
func (m *Machine) wait(tb testing.TB) {
	tb.Helper()
	select {
	case <-m.Ready():
	case <-m.Done():
		tb.Fatalf("%+v", m.Err())
	case <-time.After(Timeout):
		tb.Fatalf("no agent after %v", Timeout)
	}
}
