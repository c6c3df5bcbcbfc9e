package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// TestVMOpenFiles has a guest know more files of its share than a service of the
// host may open by itself (1024 under systemd).
func TestVMOpenFiles(t *testing.T) {
	m := sandbox(t)
	var own, daemon unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		t.Fatal(err)
	}
	for _, pid := range m.sharePIDs() {
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &daemon); err != nil {
			t.Fatal(err)
		}
		if daemon.Cur < min(own.Max, 1_000_000) {
			t.Errorf("process %d of virtiofsd may open %d files, a child of this one %d", pid, daemon.Cur, own.Max)
		}
	}
	const files = 1200
	dir := filepath.Join(m.rootfs("c"), "files")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range files {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m.create("c", nil, "/bin/sleep", "100000")
	m.startContainer("c")
	if out := m.inContainer("c", "/bin/sh", "-c", "ls -l /files | grep -c ^-r"); out != fmt.Sprint(files) {
		t.Errorf("the guest sees %s files, want %d", out, files)
	}
}

// TestVMShareChanges has the host change what a guest has just looked at, in the
// ways that a cache of names, attributes, entries or contents might miss.
func TestVMShareChanges(t *testing.T) {
	m := sandbox(t)
	m.lookout()
	dir := m.hostFile("look", "data")
	file := filepath.Join(dir, "file")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(file, "one")
	const all = "cd /data; for f in *; do echo $f=$(cat $f); done; stat -c %a file"
	m.seen(all, "file=one\n644")
	for _, step := range []struct {
		what   string
		change func()
		want   string
	}{
		{"as much, in place", func() { write(file, "two") }, "file=two\n644"},
		{"more, in place", func() { write(file, "three") }, "file=three\n644"},
		{"less, in place", func() { write(file, "4") }, "file=4\n644"},
		{"another file by that name", func() {
			write(dir+"/.new", "5")
			if err := os.Rename(dir+"/.new", file); err != nil {
				t.Fatal(err)
			}
		}, "file=5\n644"},
		{"a file beside it", func() { write(dir+"/more", "6") }, "file=5\nmore=6\n644"},
		{"one less", func() {
			if err := os.Remove(dir + "/more"); err != nil {
				t.Fatal(err)
			}
		}, "file=5\n644"},
		{"its mode", func() {
			if err := os.Chmod(file, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "file=5\n600"},
	} {
		began := time.Now()
		step.change()
		m.seen(all, step.want)
		t.Logf("%s: seen after %v", step.what, time.Since(began))
	}
}

// TestVMShareReads counts how often a guest waits for the host while it runs a
// program from its share: seldom for one that it has not run before, and never for
// one that it has, where virtiofsd can be told so.
func TestVMShareReads(t *testing.T) {
	m := sandbox(t)
	m.lookout()
	program, err := os.ReadFile("/bin/busybox") // 2 MiB, and static
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(m.hostFile("look", "new"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.hostFile("look", "new/busybox"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	waits := func(program string) int {
		t.Helper()
		for line := range strings.Lines(m.inContainer("look", program, "cat", "/guest/proc/vmstat")) {
			if n, ok := strings.CutPrefix(line, "pgmajfault "); ok {
				n, err := strconv.Atoi(strings.TrimSpace(n))
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
		t.Fatal("no pgmajfault in /proc/vmstat")
		return 0
	}
	waits("/bin/busybox")
	known := waits("/bin/busybox")
	first := waits("/new/busybox")
	again := waits("/new/busybox")
	t.Logf("%d waits for a program that is new, %d for one that is not", first-known, again-first)
	if n := first - known; n == 0 || n > 6 {
		t.Errorf("%d waits for %d bytes that are new", n, len(program))
	}
	if n := again - first; n > 1 && vmtest.Host(t).VirtiofsdDialect == qemu.DialectC {
		t.Errorf("%d waits for what the guest has", n)
	}
}
