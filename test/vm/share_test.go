package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
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
