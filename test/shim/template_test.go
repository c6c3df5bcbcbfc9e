package shim

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestShimTemplate has machines go on from templates.
func TestShimTemplate(t *testing.T) {
	h := newHostWith(t, t.TempDir())
	h.must(h.local.MakeTemplates(h.Context()))
	l := h.lan()
	h.twoOfOneTemplate(l)
	h.podFromTemplate(l)
}

// twoOfOneTemplate work as machines that booted, and have nothing in common that
// is to be their own.
func (h *host) twoOfOneTemplate(l *lan) {
	h.Helper()
	p := l.pod("a", 2)
	a := h.bundle("a", "sleep", "1000").joins(p).run()
	b := h.bundle("b", "sleep", "1000").run()
	for _, c := range []*tasks{a, b} {
		if h.find("guest="+c.id+",") == 0 || h.find("-incoming\x00defer") == 0 {
			h.Errorf("%s was booted", c.id)
		}
		began := time.Now()
		seconds, err := strconv.ParseInt(strings.TrimSpace(c.sh("date +%s")), 10, 64)
		if now := time.Unix(seconds, 0); err != nil || now.Before(began.Add(-2*time.Second)) || now.After(time.Now().Add(2*time.Second)) {
			h.Errorf("%s has the time %v, %v at %v", c.id, now, err, began)
		}
	}
	for _, what := range []string{"/dev/urandom", "/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/random/uuid"} {
		command := "head -c 32 " + what + " | sha256sum"
		if a.sh(command) == b.sh(command) {
			h.Errorf("both have the same %s", what)
		}
	}
	a.has("ip addr show eth0", podMAC(2), "inet 10.77.0.2/24")
	a.has("ping -c 3 -W 10 10.77.0.1", "3 packets received")
	a.end()
	p.clean(h)
	b.end()
}

// podFromTemplate grows with its containers, as one that booted.
func (h *host) podFromTemplate(l *lan) {
	h.Helper()
	p := l.pod("c", 3)
	pod := h.bundle("pod", "sleep", "1000").annotate("sandbox", "pod").joins(p).run()
	if h.find("-incoming\x00defer") == 0 {
		h.Error("the pod was booted")
	}
	c := h.bundle("c", "sleep", "1000").annotate("container", "pod").joins(p)
	limit := int64(256 << 20)
	c.spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	c.run()
	total, err := strconv.Atoi(strings.TrimSpace(c.sh("sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")))
	if err != nil || total < 400<<10 {
		h.Errorf("a guest of 256 MiB has %d KiB with a container of as much beside it: %v", total, err)
	}
	c.has("ping -c 3 -W 10 10.77.0.1", "3 packets received")
	c.end()
	pod.end()
	p.clean(h)
}

// Where a template can't be used the machine boots, and the log says why.
func TestShimTemplateFaults(t *testing.T) {
	dir := t.TempDir()
	h := newHostWith(t, dir)
	h.must(h.local.MakeTemplates(h.Context()))
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 2 {
		t.Fatalf("templates %q, %v", files, err)
	}
	for _, tt := range []struct {
		name, want string
		spoil      func(path string) error
	}{
		{"open", "can write to it", func(path string) error { return os.Chmod(path, 0o666) }},
		{"cut", "load of migration failed", func(path string) error {
			const memory = 256 << 20 // what is behind it is QEMU's
			return errors.Join(os.Chmod(path, 0o600), os.Truncate(path, memory+1000))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, path := range files {
				h.must(tt.spoil(path))
			}
			c := h.bundle(tt.name, "sleep", "1000").run()
			if h.look("-incoming\x00defer") != 0 {
				t.Error("the machine goes on from the template")
			}
			c.logs(tt.want)
			c.has("echo works", "works")
			c.end()
			h.wantNothing()
		})
	}
}
