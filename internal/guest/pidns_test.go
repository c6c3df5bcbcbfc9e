package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/need"
)

// The process that begins the shared pid namespace has nothing of the guest; and
// when it was killed, the next container gets another one.
func TestPidOwner(t *testing.T) {
	need.Root(t)
	cfg := Config{Root: t.TempDir()}
	b := &sandbox{cfg: cfg, pids: newLock(), containers: map[string]*container{}}
	if err := os.MkdirAll(cfg.stateDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	path, err := b.pidNamespace(t.Context(), true, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.pidOwner.close() })
	if again, err := b.pidNamespace(t.Context(), true, ""); again != path || err != nil {
		t.Errorf("second container: %q, %v, want %q", again, err, path)
	}
	if own, err := b.pidNamespace(t.Context(), false, ""); own != "" || err != nil {
		t.Errorf("without sharing: %q, %v", own, err)
	}
	if _, err := b.pidNamespace(t.Context(), false, "nobody"); !errdefs.IsNotFound(err) {
		t.Errorf("of a container that is not there: %v", err)
	}
	proc := strings.TrimSuffix(path, "/ns/pid")
	if files, err := os.ReadDir(proc + "/root"); err != nil || len(files) != 0 {
		t.Errorf("its root has %v, %v", files, err)
	}
	status, err := os.ReadFile(proc + "/status")
	if err != nil || !strings.Contains(string(status), fmt.Sprintf("Uid:\t%d\t", nobody)) || !strings.Contains(string(status), "CapEff:\t0000000000000000") {
		t.Errorf("status %s, %v", status, err)
	}
	out, err := exec.Command("nsenter", "--pid="+path, "sh", "-c", "echo $$").Output()
	if err != nil || string(out) != "2\n" {
		t.Errorf("the first that joins has pid %q, %v", out, err)
	}
	if err := b.pidOwner.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-b.pidOwner.ended
	if next, err := b.pidNamespace(t.Context(), true, ""); next == path || err != nil {
		t.Errorf("after its end: %q, %v", next, err)
	}
}

// One that can't be started leaves no directory.
func TestPidOwnerFails(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, ".pause", "pause"), 0o700); err != nil { // where its program belongs
		t.Fatal(err)
	}
	if o, err := startPidOwner(dir); err == nil {
		t.Errorf("started: %v", o.close())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
