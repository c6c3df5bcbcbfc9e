package shim

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
)

// TestShimTemplate has two machines go on from one template: they work as those
// that booted, and have nothing in common that is to be their own.
func TestShimTemplate(t *testing.T) {
	h := newHost(t, "template_dir = '"+t.TempDir()+"'")
	h.must(h.local.MakeTemplates(h.Context()))
	p := h.lan().pod("a", 2)
	a := h.bundle("a", "sleep", "1000").joins(p).run()
	b := h.bundle("b", "sleep", "1000").run()
	for _, c := range []*tasks{a, b} {
		if h.find("guest="+c.id+",") == 0 || h.find("-incoming\x00defer") == 0 {
			t.Errorf("%s was booted", c.id)
		}
		began := time.Now()
		seconds, err := strconv.ParseInt(strings.TrimSpace(c.sh("date +%s")), 10, 64)
		if now := time.Unix(seconds, 0); err != nil || now.Before(began.Add(-2*time.Second)) || now.After(time.Now().Add(2*time.Second)) {
			t.Errorf("%s has the time %v, %v at %v", c.id, now, err, began)
		}
	}
	for _, what := range []string{"/dev/urandom", "/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/random/uuid"} {
		command := "head -c 32 " + what + " | sha256sum"
		if a.sh(command) == b.sh(command) {
			t.Errorf("both have the same %s", what)
		}
	}
	a.has("ip addr show eth0", podMAC(2), "inet 10.77.0.2/24")
	a.has("ping -c 3 -W 10 10.77.0.1", "3 packets received")
	a.end()
	p.clean(h)
	b.end()
}

// A template that can't be used is an error that names it, not a machine that
// does something else.
func TestShimTemplateFaults(t *testing.T) {
	dir := t.TempDir()
	h := newHost(t, "template_dir = '"+dir+"'")
	h.must(h.local.MakeTemplates(h.Context()))
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 2 {
		t.Fatalf("templates %q, %v", files, err)
	}
	for _, tt := range []struct {
		name, want string
		spoil      func(path string) error
	}{
		{"open", "can be written by others", func(path string) error { return os.Chmod(path, 0o666) }},
		{"cut", "load template", func(path string) error {
			if err := os.Chmod(path, 0o600); err != nil {
				return err
			}
			return os.Truncate(path, 1<<20)
		}},
		{"no", "load template", func(path string) error { return os.WriteFile(path, []byte("junk\n"), 0o600) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, path := range files {
				h.must(tt.spoil(path))
			}
			c := h.bundle(tt.name, "true").start()
			_, err := c.Create(c.ctx(), &taskapi.CreateTaskRequest{ID: c.id, Bundle: c.bundle})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Create: %v, want %q in it", err, tt.want)
			}
			c.shutdown()
			h.wantNothing()
		})
	}
}
