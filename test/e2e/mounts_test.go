package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func bind(from, to, options string) []string {
	return []string{"--mount", fmt.Sprintf("type=bind,src=%s,dst=%s,options=%s", from, to, options)}
}

func TestE2EBindMount(tt *testing.T) {
	once(tt, func(t *test) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "a"), "from the host\n")
		id := t.spawn(bind(dir, "/data", "rbind:rw"), "sleep", "1000")

		t.equal("read inside", t.exec(id, "cat", "/data/a"), "from the host\n")
		t.exec(id, "sh", "-c", "echo from the container > /data/b; mkdir /data/d; echo x > /data/d/f; chmod 640 /data/d/f; ln -s b /data/l")
		t.equal("read outside", read(t, filepath.Join(dir, "b")), "from the container\n")
		t.equal("through a link", read(t, filepath.Join(dir, "l")), "from the container\n")
		if fi, err := os.Stat(filepath.Join(dir, "d/f")); err != nil || fi.Mode().Perm() != 0o640 {
			t.Errorf("mode of a file made inside: %v, %v", fi, err)
		}
		write(t, filepath.Join(dir, "a"), "changed\n")
		t.eventually("a change on the host is seen inside", func() bool { return t.exec(id, "cat", "/data/a") == "changed\n" })
		write(t, filepath.Join(dir, "new"), "later\n")
		t.equal("a file made later", t.exec(id, "cat", "/data/new"), "later\n")
	})
}

func TestE2EReadOnlyMount(tt *testing.T) {
	once(tt, func(t *test) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "a"), "from the host\n")
		r := t.try("", runArgs(append(bind(dir, "/data", "rbind:ro"), "--rm"), t.id(""), "sh", "-c", "cat /data/a; echo x > /data/b")...)
		t.equal("stdout", r.stdout, "from the host\n")
		if r.code == 0 || !strings.Contains(r.stderr, "Read-only file system") {
			t.Errorf("writing: exit code %d, stderr %q", r.code, r.stderr)
		}
		if _, err := os.Stat(filepath.Join(dir, "b")); err == nil {
			t.Error("it was written all the same")
		}
	})
}

func TestE2EFileMount(tt *testing.T) {
	once(tt, func(t *test) {
		file := filepath.Join(t.TempDir(), "motd")
		write(t, file, "hello\n")
		r := t.try("", runArgs(append(bind(file, "/etc/motd", "rbind:rw"), "--rm"), t.id(""), "sh", "-c", "cat /etc/motd; echo changed > /etc/motd")...)
		t.equal("stdout", r.stdout, "hello\n")
		t.equal("file on the host", read(t, file), "changed\n")
	})
}

func TestE2EMountOfNothing(tt *testing.T) {
	once(tt, func(t *test) {
		r := t.try("", runArgs(append(bind("/no/such/dir", "/data", "rbind:ro"), "--rm"), t.id(""), "true")...)
		if r.code == 0 || !strings.Contains(r.stderr, "/no/such/dir") {
			t.Errorf("exit code %d, stderr %q: want the path in an error", r.code, r.stderr)
		}
	})
}

// Two containers share a directory, each from its machine.
func TestE2ESharedMount(tt *testing.T) {
	once(tt, func(t *test) {
		dir := t.TempDir()
		flags := append(bind(dir, "/data", "rbind:rw"), "--detach")
		a, b := t.id("a"), t.id("b")
		for _, id := range []string{a, b} {
			t.ctr(runArgs(flags, id, "sleep", "1000")...)
		}
		t.exec(a, "sh", "-c", "echo one > /data/x")
		t.equal("read in the other", t.exec(b, "cat", "/data/x"), "one\n")
	})
}

func write(t *test, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *test, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(text)
}
