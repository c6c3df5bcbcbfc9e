package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// testAnchor starts one whose root has a file of the given name.
func testAnchor(t *testing.T, plan anchorPlan) (*anchor, error) {
	t.Helper()
	need.Root(t)
	if plan.Root == "" {
		plan.Root = t.TempDir()
	}
	if err := os.WriteFile(filepath.Join(plan.Root, "here"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	plan.Name = "vmshim-anchor test"
	var seen hypervisor.Process
	a, err := startAnchor(t.Context(), plan, "MARK=1", func(p hypervisor.Process) error { seen = p; return nil })
	if seen.PID == 0 {
		t.Error("nobody was told of the process")
	}
	if err != nil {
		if alive(seen) {
			t.Error("the process is left")
		}
		return nil, err
	}
	t.Cleanup(a.stop)
	return a, nil
}

func namespaceOf(t *testing.T, pid any, kind string) string {
	t.Helper()
	s, err := os.Readlink(fmt.Sprintf("/proc/%v/ns/%s", pid, kind))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRootAnchor(t *testing.T) {
	a, err := testAnchor(t, anchorPlan{Hostname: "box", Namespaces: testSpec().Linux.Namespaces})
	if err != nil {
		t.Fatal(err)
	}
	proc := func(name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", a.PID, name))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", a.PID))
	if err != nil || len(entries) != 1 || entries[0].Name() != "here" {
		t.Errorf("root has %v %v", entries, err)
	}
	if got := proc("environ"); got != "MARK=1\x00" {
		t.Errorf("environment %q", got)
	}
	if got := proc("cmdline"); got != "vmshim-anchor test\x00" {
		t.Errorf("command line %q", got)
	}
	for _, kind := range []string{"net", "uts", "ipc", "mnt"} {
		if namespaceOf(t, a.PID, kind) == namespaceOf(t, "self", kind) {
			t.Errorf("%s namespace is ours", kind)
		}
	}
	for _, kind := range []string{"pid", "user"} {
		if namespaceOf(t, a.PID, kind) != namespaceOf(t, "self", kind) {
			t.Errorf("%s namespace is not ours", kind)
		}
	}
	if mounts := strings.Count(proc("mountinfo"), "\n"); mounts != 1 {
		t.Errorf("%d mounts:\n%s", mounts, proc("mountinfo"))
	}
	out, err := exec.Command("nsenter", "--uts=/proc/"+fmt.Sprint(a.PID)+"/ns/uts", "uname", "-n").Output()
	if got := strings.TrimSpace(string(out)); got != "box" {
		t.Errorf("hostname %q: %v", got, err)
	}
	// It ends like any process, and without doing harm.
	if err := a.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	ended(t, "anchor", a.done)
	if ws := a.cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signal() != syscall.SIGTERM {
		t.Errorf("ended with %v", a.cmd.ProcessState)
	}
}

func TestRootAnchorJoins(t *testing.T) {
	first, err := testAnchor(t, anchorPlan{Namespaces: testSpec().Linux.Namespaces})
	if err != nil {
		t.Fatal(err)
	}
	a, err := testAnchor(t, anchorPlan{Namespaces: []specs.LinuxNamespace{
		{Type: specs.NetworkNamespace, Path: fmt.Sprintf("/proc/%d/ns/net", first.PID)},
		{Type: specs.PIDNamespace, Path: "/not/joined"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if namespaceOf(t, a.PID, "net") != namespaceOf(t, first.PID, "net") {
		t.Error("another net namespace")
	}
	if namespaceOf(t, a.PID, "uts") != namespaceOf(t, "self", "uts") {
		t.Error("a uts namespace that was not asked for")
	}
}

func TestRootAnchorFails(t *testing.T) {
	_, err := testAnchor(t, anchorPlan{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/nowhere"}}})
	fails(t, err, nil, "start task process", "/nowhere", "no such file")

	_, err = startAnchor(t.Context(), anchorPlan{Root: "/nowhere"}, "MARK=1", func(hypervisor.Process) error { return nil })
	fails(t, err, nil, "bind root \"/nowhere\"")

	full := errors.New("disk full")
	_, err = startAnchor(t.Context(), anchorPlan{Root: t.TempDir()}, "MARK=1", func(hypervisor.Process) error { return full })
	fails(t, err, full)

	ctx, cancel := context.WithCancel(t.Context())
	_, err = startAnchor(ctx, anchorPlan{Root: t.TempDir()}, "MARK=1", func(hypervisor.Process) error { cancel(); return nil })
	fails(t, err, context.Canceled)
}

func TestAnchorMainMisused(t *testing.T) {
	for _, args := range [][]string{nil, {"{"}, {"{}", "x"}} {
		cmd := exec.Command("/proc/self/exe", append([]string{"anchor"}, args...)...)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.ExtraFiles = []*os.File{w}
		if err := cmd.Run(); err == nil {
			t.Errorf("%q succeeded", args)
		}
		_ = w.Close()
		text := make([]byte, 100)
		if n, err := r.Read(text); n == 0 {
			t.Errorf("%q: no report: %v", args, err)
		}
		_ = r.Close()
	}
}
