package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A template is for machines that are the same to QEMU and to the guest, and for
// no others.
func TestTemplateFile(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	host := Host{Arch: "amd64", QEMU: file("qemu"), Machine: "pc-q35-7.2", Accelerator: TCG, Vsock: VsockVhostUser}
	kvm := host
	kvm.Accelerator = KVM
	cfg := Config{TemplateDir: filepath.Join(dir, "templates")}
	base := spec("amd64")
	base.Kernel, base.Initrd = file("kernel"), file("initrd")
	find := func(host Host, cfg Config, change func(*hypervisor.Spec)) string {
		s := base
		change(&s)
		path, err := cfg.templateFile(s, host)
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	same := func(*hypervisor.Spec) {}
	want := find(host, cfg, same)
	if filepath.Dir(want) != cfg.TemplateDir {
		t.Errorf("template is %q", want)
	}
	for name, got := range map[string]string{
		"name":  find(host, cfg, func(s *hypervisor.Spec) { s.Name = "other" }),
		"share": find(host, cfg, func(s *hypervisor.Spec) { s.Shares = []hypervisor.Share{{Tag: "x", Dir: "/x"}} }),
	} {
		if got != want {
			t.Errorf("another %s has another template", name)
		}
	}
	other := cfg
	other.CPU = "qemu64"
	for name, got := range map[string]string{
		"memory":      find(host, cfg, func(s *hypervisor.Spec) { s.MemoryMiB, s.MaxMemoryMiB = 512, 512 }),
		"growth":      find(host, cfg, func(s *hypervisor.Spec) { s.MaxMemoryMiB = 512 }),
		"parameter":   find(host, cfg, func(s *hypervisor.Spec) { s.KernelParams = []string{"x"} }),
		"CPU":         find(host, other, same),
		"accelerator": find(kvm, cfg, same),
	} {
		if got == want {
			t.Errorf("another %s has the same template", name)
		}
	}
	for name, got := range map[string]string{
		"a machine with a disk": find(host, cfg, func(s *hypervisor.Spec) { s.Disks = []hypervisor.Disk{{ID: "d", Path: "/d"}} }),
		"no directory":          find(host, Config{}, same),
	} {
		if got != "" {
			t.Errorf("%s has template %q", name, got)
		}
	}
	for _, path := range []string{host.QEMU, base.Kernel, base.Initrd} {
		before := find(host, cfg, same)
		if err := os.Chtimes(path, time.Time{}, time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if find(host, cfg, same) == before {
			t.Errorf("another %s has the same template", filepath.Base(path))
		}
	}
	if err := os.Remove(base.Kernel); err != nil {
		t.Fatal(err)
	}
	if _, err := cfg.templateFile(base, host); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no kernel: %v", err)
	}
}
