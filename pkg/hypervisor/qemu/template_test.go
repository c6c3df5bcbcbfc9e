package qemu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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

// Only what is not zero is copied: the rest are holes, and take no memory.
func TestCopyMemory(t *testing.T) {
	const page, size = 4096, 8 << 20
	from, to := image(t), image(t)
	want := make([]byte, size)
	for _, at := range []int{0, page + 1, 3<<20 - 1, 3 << 20, size - 1} {
		want[at] = 1
	}
	for _, path := range []string{from.Path, to.Path} {
		if err := os.Truncate(path, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size+page); err != nil {
			t.Fatal(err)
		}
	}
	source, target := open(t, from.Path), open(t, to.Path)
	if _, err := source.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := source.WriteAt([]byte("state"), size); err != nil {
		t.Fatal(err)
	}
	if err := copyMemory(t.Context(), target, source, size); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size+5)
	if _, err := target.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, append(want, make([]byte, 5)...)) {
		t.Error("the copy differs, or has what is behind the memory")
	}
	info, err := target.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Blocks*512 > 5*page {
		t.Errorf("the copy takes %d bytes", st.Blocks*512)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := copyMemory(ctx, target, source, size); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// QEMU that dies over a template leaves none behind that is not whole, and says so
// that the machine can boot instead.
func TestTemplateQEMUDies(t *testing.T) {
	s, opts := templateMachine(t)
	if _, err := MakeTemplate(within(t), s, opts); err == nil || !strings.Contains(err.Error(), "qemu ended: exit status 0") {
		t.Errorf("make: %v", err)
	}
	checkEmpty(t, opts.Config.TemplateDir)

	path, err := opts.Config.templateFile(s, *opts.Host)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("template"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, memorySize(s)); err != nil {
		t.Fatal(err)
	}
	_, err = Start(within(t), s, opts)
	unusable, ok := errors.AsType[*TemplateError](err)
	if !ok || unusable.Path != path || !strings.Contains(err.Error(), "qemu ended: exit status 0") {
		t.Errorf("load: %v", err)
	}
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
