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
	"golang.org/x/sys/unix"
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

// The first sandbox of a kind makes the template that it goes on from, as others do.
func TestShimTemplateMade(t *testing.T) {
	dir := t.TempDir()
	h := newHostWith(t, dir, "make_templates = 'always'")
	var first os.FileInfo
	for _, id := range []string{"a", "b"} {
		c := h.bundle(id, "sleep", "1000").run()
		if h.look("-incoming\x00defer") == 0 {
			t.Errorf("%s was booted", id)
		}
		c.has("echo works", "works")
		made := h.templates(dir)
		if first == nil {
			first = made[0]
		}
		if len(made) != 1 || !os.SameFile(made[0], first) {
			t.Errorf("%s: %d templates, the first of %v, not %v", id, len(made), made[0].ModTime(), first.ModTime())
		}
		c.end()
		h.wantNothing()
	}
	c := h.bundle("c", "sleep", "1000")
	limit := int64(64 << 20)
	c.spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	c.run()
	if n := len(h.templates(dir)); n != 1 || h.look("-incoming\x00defer") != 0 {
		t.Errorf("a larger machine goes on from one of %d templates", n)
	}
	c.end()
}

func (h *host) templates(dir string) (made []os.FileInfo) {
	h.Helper()
	entries, err := os.ReadDir(dir)
	h.must(err)
	for _, e := range entries {
		info, err := e.Info()
		h.must(err)
		made = append(made, info)
	}
	return made
}

// Whoever dies over a template leaves nothing on the host but the file, which the
// next one removes.
func TestShimTemplateKilled(t *testing.T) {
	for _, tt := range []struct {
		name, victim string
		then         func(h *host, c *tasks, dir string)
	}{
		{"the shim", "-id\x00first\x00", func(h *host, c *tasks, dir string) {
			c.cleanup()
			h.wantNothing()
			if left := h.templates(dir); len(left) != 1 || !strings.HasPrefix(left[0].Name(), ".new") {
				h.Errorf("left in the directory of templates: %v", left)
			}
			next := h.bundle("next", "sleep", "1000").run()
			if made := h.templates(dir); len(made) != 1 || h.look("-incoming\x00defer") == 0 {
				h.Errorf("the next one was booted; templates: %v", made)
			}
			next.end()
		}},
		{"QEMU", "guest=first,", func(h *host, c *tasks, dir string) {
			h.sink.want(h, "create first")
			c.logs("no template was made")
			if made := h.templates(dir); len(made) != 1 || !strings.HasSuffix(made[0].Name(), ".failed") {
				h.Errorf("left in the directory of templates: %v", made)
			}
			c.startTask()
			c.has("echo works", "works")
			c.end()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			h := newHostWith(t, dir, "make_templates = 'always'")
			c := h.bundle("first", "sleep", "1000").start()
			created := make(chan error, 1)
			go func() {
				_, err := c.Create(c.ctx(), c.createRequest())
				created <- err
			}()
			h.await("guest=first,") // the machine
			h.must(unix.Kill(h.find(tt.victim), unix.SIGKILL))
			if err := <-created; (err == nil) != (tt.name == "QEMU") {
				t.Errorf("Create: %v", err)
			}
			tt.then(h, c, dir)
			h.wantNothing()
		})
	}
}
