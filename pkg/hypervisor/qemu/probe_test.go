package qemu

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/need"
)

// program writes a shell script.
func program(t *testing.T, dir, name, body string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	qemuSays = `case "$*" in
--version) echo 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)' ;;
*) echo 'Supported machines are:
pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
virt                 QEMU 7.2 ARM Virtual Machine (alias of virt-7.2)' ;;
esac
`
	virtiofsdC    = "echo 'usage: virtiofsd [options]\n    -o source=PATH  shared directory tree'\n"
	virtiofsdRust = "echo 'Options:\n      --shared-dir <SHARED_DIR>'\n"
)

// fakeHost is a root directory with devices and processor as wished, and
// programs in a directory.
func fakeHost(t *testing.T, flags string, devices ...string) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range map[string]string{"proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu " + flags + " pae\n"} {
		write(t, filepath.Join(root, path), text)
	}
	for _, d := range devices {
		path := filepath.Join(root, "dev", d)
		write(t, path, "")
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestProbeChooses(t *testing.T) {
	bin := t.TempDir()
	qemu := program(t, bin, "qemu-any", qemuSays)
	vsock := program(t, bin, "vhost-device-vsock", "")
	fsd := program(t, bin, "virtiofsd", virtiofsdRust)
	cfg := func(change func(*Config)) Config {
		c := Config{Path: qemu, VhostDeviceVsock: vsock, Virtiofsd: fsd}
		if change != nil {
			change(&c)
		}
		return c
	}
	all := []string{"kvm", "vhost-vsock"}
	tests := []struct {
		name                    string
		root                    string
		cfg                     Config
		accelerator, vsock, bad string
		warnings                int
	}{
		{"everything", fakeHost(t, "svm", all...), cfg(nil), KVM, VsockKernel, "", 0},
		{"a kvm that is none", fakeHost(t, "", all...), cfg(nil), TCG, VsockKernel, "", 1},
		{"nothing", fakeHost(t, "vmx"), cfg(nil), TCG, VsockVhostUser, "", 2},
		{"tcg wished", fakeHost(t, "vmx", all...), cfg(func(c *Config) { c.Accelerator = TCG }), TCG, VsockKernel, "", 0},
		{"vhost-user wished", fakeHost(t, "vmx", all...), cfg(func(c *Config) { c.Vsock = VsockVhostUser }), KVM, VsockVhostUser, "", 0},
		{"kvm wished", fakeHost(t, "", all...), cfg(func(c *Config) { c.Accelerator = KVM }), "", "", "neither vmx nor svm", 0},
		{"kernel's vsock wished", fakeHost(t, "vmx", "kvm"), cfg(func(c *Config) { c.Vsock = VsockKernel }), "", "", "load the module vhost_vsock", 0},
		{"no vsock at all", fakeHost(t, "vmx", "kvm"), cfg(func(c *Config) { c.VhostDeviceVsock = "/no/vsock" }), "", "", "install vhost-device-vsock", 0},
		{"no qemu", fakeHost(t, "vmx", all...), cfg(func(c *Config) { c.Path = "/no/qemu" }), "", "", "install qemu-system-", 0},
		{"a qemu that is none", fakeHost(t, "vmx", all...), cfg(func(c *Config) { c.Path = vsock }), "", "", "not a QEMU", 0},
		{"a virtiofsd that is none", fakeHost(t, "vmx", all...), cfg(func(c *Config) { c.Virtiofsd = vsock }), "", "", "not a virtiofsd", 0},
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("the flags are those of amd64")
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := prober{cfg: tt.cfg, host: &Host{Arch: runtime.GOARCH}, root: tt.root, learned: openCache("")}
			err := p.all(t.Context())
			if tt.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tt.bad) {
					t.Errorf("error %v lacks %q", err, tt.bad)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			h := p.host
			if h.Accelerator != tt.accelerator || h.Vsock != tt.vsock {
				t.Errorf("got %s and %s, want %s and %s", h.Accelerator, h.Vsock, tt.accelerator, tt.vsock)
			}
			if len(h.Warnings) != tt.warnings {
				t.Errorf("warnings %q, want %d", h.Warnings, tt.warnings)
			}
			if h.Version != "7.2.22" || h.Machine != "pc-q35-7.2" || h.VirtiofsdDialect != DialectRust {
				t.Errorf("found %+v", h)
			}
		})
	}
}

// A KVM that QEMU's user can't open is passed over, or refused with what to do
// about its permissions.
func TestProbePrivateKVM(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the flags are those of amd64")
	}
	need.Root(t) // QEMU has a user of its own only then
	root := fakeHost(t, "svm", "kvm", "vhost-vsock")
	if err := os.Chmod(filepath.Join(root, "dev/kvm"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, wish := range []string{"auto", KVM} {
		p := prober{cfg: Config{Accelerator: wish, UIDBase: 1}, host: &Host{Arch: "amd64"}, root: root}
		err := p.accelerator()
		switch text := strings.Join(p.host.Warnings, "; "); wish {
		case "auto":
			if err != nil || p.host.Accelerator != TCG || !strings.Contains(text, "for root only") {
				t.Errorf("auto: %s, %v, %q", p.host.Accelerator, err, text)
			}
		case KVM:
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "chmod 660") || strings.Contains(err.Error(), "firmware") {
				t.Errorf("kvm: %v", err)
			}
		}
	}
}

// All that is missing is said at once.
func TestProbeNamesEverythingMissing(t *testing.T) {
	p := prober{
		cfg:  Config{Path: "/no/qemu", VhostDeviceVsock: "/no/vsock", Virtiofsd: "/no/fsd"},
		host: &Host{Arch: "amd64"}, root: t.TempDir(), learned: openCache(""),
	}
	err := p.all(t.Context())
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("class of %v", err)
	}
	for _, text := range []string{"/no/qemu", "/no/vsock", "/no/fsd"} {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q lacks %s", err, text)
		}
	}
}

func TestProbeRefusesConfig(t *testing.T) {
	_, err := Probe(t.Context(), Config{Accelerator: "hvf", Vsock: "smoke", VirtiofsdCache: "some"})
	if err == nil || strings.Count(err.Error(), "is not one of") != 3 {
		t.Errorf("error %v", err)
	}
}

func TestProbeRemembers(t *testing.T) {
	bin, dir := t.TempDir(), t.TempDir()
	asked := filepath.Join(bin, "asked")
	qemu := program(t, bin, "qemu", "echo . >>"+asked+"\n"+qemuSays)
	fsd := program(t, bin, "virtiofsd", "echo . >>"+asked+"\n"+virtiofsdC)
	probe := func() int {
		t.Helper()
		c := openCache(dir)
		p := prober{
			cfg:  Config{Path: qemu, Virtiofsd: fsd, VhostDeviceVsock: fsd, Accelerator: TCG},
			host: &Host{Arch: "amd64"}, root: t.TempDir(), learned: c,
		}
		if err := p.all(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.save(t.Context())
		if p.host.Version != "7.2.22" || p.host.Machine != "pc-q35-7.2" || p.host.VirtiofsdDialect != DialectC {
			t.Errorf("found %+v", p.host)
		}
		text, _ := os.ReadFile(asked)
		return bytes.Count(text, []byte("\n"))
	}
	if n := probe(); n != 3 {
		t.Errorf("asked %d times, want 3", n)
	}
	if n := probe(); n != 3 {
		t.Errorf("asked again: %d", n)
	}
	program(t, bin, "virtiofsd", "echo . >>"+asked+"\n"+virtiofsdC+"# new\n")
	if n := probe(); n != 4 {
		t.Errorf("a new binary was not asked: %d", n)
	}
	write(t, filepath.Join(dir, cacheName), "{")
	if n := probe(); n != 7 {
		t.Errorf("a broken cache was believed: %d", n)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if n := probe(); n != 10 {
		t.Errorf("a cache that anybody may write was believed: %d", n)
	}
}

func TestDeviceGroup(t *testing.T) {
	for mode, ok := range map[os.FileMode]bool{0o666: true, 0o600: false, 0o640: false} {
		path := filepath.Join(t.TempDir(), "kvm")
		write(t, path, "")
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := deviceGroup(path); (err == nil) != ok {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
}
