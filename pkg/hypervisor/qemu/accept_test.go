package qemu

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// TestQEMUAcceptsArgs hands the arguments of every case that this host can do
// to the real QEMU, with its real helpers; no guest runs (-S).
func TestQEMUAcceptsArgs(t *testing.T) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil || runtime.GOARCH != "amd64" {
		need.Missing(t, "needs qemu-system-x86_64 (package qemu-system-x86)")
	}
	need.Root(t)
	cases := []struct {
		name   string
		change func(*hypervisor.Spec)
	}{
		{"plain", func(*hypervisor.Spec) {}},
		{"hotplug", func(s *hypervisor.Spec) { s.Name, s.MaxVCPUs, s.MaxMemoryMiB = "a,b", 4, 2048 }},
		{"devices", withDevices(t)},
		{"block device", withBlockDevice(t)},
	}
	for _, accelerator := range []string{TCG, KVM} {
		for _, kind := range []string{VsockKernel, VsockVhostUser} {
			for _, tt := range cases {
				t.Run(accelerator+" "+kind+" "+tt.name, func(t *testing.T) {
					cfg := Config{Path: path, Accelerator: accelerator, Vsock: kind, VhostDeviceVsock: vhostDeviceVsock(), UIDBase: 2000000000}
					host, err := Probe(t.Context(), cfg)
					var missing *MissingError
					if errors.As(err, &missing) && (missing.What == "kvm" || missing.What == "vsock") {
						t.Skip(err) // a host has one or the other
					}
					if err != nil {
						t.Fatal(err)
					}
					accept(t, cfg, host, tt.change)
				})
			}
		}
	}
}

// The other architecture can be emulated as far as that.
func TestARM64QEMUAcceptsArgs(t *testing.T) {
	if runtime.GOARCH == "arm64" {
		t.Skip("this host's own")
	}
	path, err := exec.LookPath("qemu-system-aarch64")
	if err != nil {
		need.Missing(t, "needs qemu-system-aarch64 (package qemu-system-arm)")
	}
	need.Root(t)
	cfg := Config{Path: path, Accelerator: TCG, Vsock: VsockVhostUser, VhostDeviceVsock: vhostDeviceVsock(), UIDBase: 2000000000}
	host := &Host{Arch: "arm64"}
	p := prober{cfg: cfg, host: host, root: "/", learned: openCache("")}
	if err := p.all(t.Context()); err != nil {
		t.Fatal(err)
	}
	accept(t, cfg, host, func(s *hypervisor.Spec) {
		s.Arch, s.MaxVCPUs, s.MaxMemoryMiB = "arm64", 4, 2048
		withDevices(t)(s)
	})
}

// TestQEMUAcceptsPlug hands every command to the real QEMU; no guest runs.
func TestQEMUAcceptsPlug(t *testing.T) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil || runtime.GOARCH != "amd64" {
		need.Missing(t, "needs qemu-system-x86_64 (package qemu-system-x86)")
	}
	need.Root(t)
	cfg := Config{Path: path, VhostDeviceVsock: vhostDeviceVsock(), UIDBase: 2000000000}
	host, err := Probe(t.Context(), cfg)
	if err != nil {
		need.Missing(t, "%v", err)
	}
	s, opts := fakeMachine(t, behaviour{})
	s.Kernel, s.Initrd, s.Shares = bzImage(t), bzImage(t), nil
	s.MaxVCPUs, s.MaxMemoryMiB, s.MemorySlots = 3, 1024, 4
	opts.Config, opts.Host, opts.Env, opts.extra = cfg, host, nil, []string{"-S"}
	vm, err := Start(within(t), s, opts)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer vm.Kill() //nolint:errcheck // when the checks below have failed
	ctx := within(t)
	disk := image(t)
	scsi := hypervisor.Disk{ID: "scsi", Path: disk.Path, ReadOnly: true}
	var devices hypervisor.Spec
	withBlockDevice(t)(&devices)
	for _, d := range devices.Disks {
		if _, err := vm.PlugDisk(ctx, d); err != nil {
			t.Errorf("block device: %v", err)
		}
	}
	for what, plug := range map[string]func() error{
		"disk":      func() error { _, err := vm.PlugDisk(ctx, disk); return err },
		"read-only": func() error { _, err := vm.PlugSCSIDisk(ctx, scsi); return err },
		"pci": func() error {
			_, err := vm.PlugPCI(ctx, hypervisor.PCIDevice{ID: "x", Driver: "pci-testdev"})
			return err
		},
		"cpus":   func() error { _, err := vm.ResizeCPUs(ctx, 3); return err },
		"memory": func() error { _, err := vm.ResizeMemory(ctx, 512); return err },
		"share": func() error {
			if host.Virtiofsd == "" {
				return nil
			}
			_, err := vm.PlugShare(ctx, hypervisor.Share{Tag: "x", Dir: t.TempDir()})
			return err
		},
	} {
		if err := plug(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := os.Truncate(disk.Path, 2<<20); err != nil {
		t.Fatal(err)
	}
	if size, err := vm.GrowDisk(ctx, disk.ID); size != 2<<20 || err != nil {
		t.Errorf("grown to %d, %v", size, err)
	}
	if _, err := vm.PlugPCI(ctx, hypervisor.PCIDevice{ID: "y", Driver: "nosuch"}); err == nil {
		t.Error("qemu has a driver nosuch")
	}
	if err := vm.UnplugDisk(ctx, "scsi"); err != nil { // for which the guest is only told
		t.Error(err)
	}
}

func accept(t *testing.T, cfg Config, host *Host, change func(*hypervisor.Spec)) {
	t.Helper()
	s, opts := fakeMachine(t, behaviour{})
	s.Kernel, s.Initrd, s.Shares = bzImage(t), bzImage(t), nil
	change(&s)
	if len(s.Shares) > 0 && host.Virtiofsd == "" {
		need.Missing(t, "needs virtiofsd (package qemu-system-common or virtiofsd)")
	}
	opts.Config, opts.Host, opts.Env, opts.extra = cfg, host, nil, []string{"-S"}
	vm, err := Start(within(t), s, opts)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer vm.Kill() //nolint:errcheck // when the checks below have failed
	var status struct{ Status string }
	if err := vm.qmp.Execute(within(t), "query-status", nil, &status); err != nil || status.Status != "prelaunch" {
		t.Errorf("status %q, %v", status.Status, err)
	}
	if err := vm.qmp.Execute(within(t), "quit", nil, nil); err != nil {
		t.Error(err)
	}
	await(t, "end", vm.Done())
	if want := "qemu was told to quit"; vm.Err() == nil || vm.Err().(*ExitError).State != want { //nolint:errorlint // it is one
		t.Errorf("end: %+v, want %s", vm.Err(), want)
	}
}

func withDevices(t *testing.T) func(*hypervisor.Spec) {
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil { // for root's eyes only
		t.Fatal(err)
	}
	return func(s *hypervisor.Spec) {
		s.Shares = []hypervisor.Share{{Tag: "one,two", Dir: dir}, {Tag: "two", Dir: dir}}
		s.Disks = []hypervisor.Disk{{ID: "ro", Path: image, ReadOnly: true}, {ID: "rw", Path: image}}
	}
}

func withBlockDevice(t *testing.T) func(*hypervisor.Spec) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", image).Output()
	if err != nil {
		t.Logf("no loop device: %v", err)
		return func(*hypervisor.Spec) {}
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", device).Run(); err != nil {
			t.Errorf("detach %s: %v", device, err)
		}
	})
	return func(s *hypervisor.Spec) {
		s.Disks = []hypervisor.Disk{{ID: "ro", Path: device, ReadOnly: true}, {ID: "rw", Path: device}}
	}
}

// bzImage has just enough of a header for QEMU to load it (Documentation/x86/boot.rst).
func bzImage(t *testing.T) string {
	image := make([]byte, 8<<10)
	image[0x1f1] = 1                        // sectors of setup code
	copy(image[0x1fe:], "\x55\xaa")         // boot flag
	copy(image[0x202:], "HdrS\x0c\x02")     // protocol 2.12
	image[0x211] = 1                        // loaded high
	copy(image[0x22c:], "\xff\xff\xff\x7f") // highest address of the initrd
	path := filepath.Join(t.TempDir(), "bzImage")
	if err := os.WriteFile(path, image, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// vhostDeviceVsock is where the binary may be besides the places that Probe knows.
func vhostDeviceVsock() string {
	if _, err := find("", "vhost-device-vsock", vsockDirs...); err == nil {
		return ""
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(cache, "vmshim/vhost-device-vsock/vhost-device-vsock")
}

// The start path pays for QEMU alone: what is ours takes a moment.
func BenchmarkStart(b *testing.B) {
	cfg := Config{VhostDeviceVsock: vhostDeviceVsock(), UIDBase: 2000000000}
	host, err := Probe(b.Context(), cfg)
	if err != nil {
		b.Skip(err)
	}
	s, opts := fakeMachine(b, behaviour{qemu: "serve"})
	opts.Config, opts.Host.VhostDeviceVsock = cfg, host.VhostDeviceVsock
	var before time.Duration
	for b.Loop() {
		t := time.Now()
		opts.Started = func(p hypervisor.Process) error {
			if p.Role == roleQEMU {
				before += time.Since(t)
			}
			return nil
		}
		vm, err := Start(context.WithoutCancel(b.Context()), s, opts)
		if err != nil {
			b.Fatal(err)
		}
		_ = vm.Kill()
	}
	b.ReportMetric(float64(before.Microseconds())/float64(b.N)/1000, "ms-to-qemu/op")
}
