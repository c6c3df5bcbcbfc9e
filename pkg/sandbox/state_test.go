package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

func TestDir(t *testing.T) {
	a := Dir("/run/vmshim", "/run/containerd/containerd.sock", "default", "c1")
	if dir, name := filepath.Split(a); dir != "/run/vmshim/" || len(name) != 16 {
		t.Errorf("directory %q", a)
	}
	for _, b := range []string{
		Dir("/run/vmshim", "/run/containerd/containerd.sock", "default", "c2"),
		Dir("/run/vmshim", "/run/containerd/containerd.sock", "defaultc", "1"),
		Dir("/run/vmshim", "/run/other.sock", "default", "c1"),
	} {
		if a == b {
			t.Errorf("twice %q", a)
		}
	}
}

func TestState(t *testing.T) {
	dir := t.TempDir()
	st := newStore(Options{ID: "sb", Namespace: "ns", Address: "addr", Dir: dir, Began: time.Unix(1, 0).UTC()})
	if err := st.process(hypervisor.Process{Role: "early", PID: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("written before open: %v", err)
	}
	if err := st.open(); err != nil {
		t.Fatal(err)
	}
	if err := st.container("c1", func(c *ContainerState) { c.Bundle = "/b"; c.Hooked = true }); err != nil {
		t.Fatal(err)
	}
	st.mark(t.Context(), PhaseAgent, time.Unix(2, 0).UTC())
	st.mark(t.Context(), PhaseAgent, time.Unix(3, 0).UTC())
	got, err := ReadState(dir)
	if err != nil {
		t.Fatal(err)
	}
	self, err := processOf("shim", os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&State{
		Version: StateVersion, ID: "sb", Namespace: "ns", Address: "addr", Shim: self,
		Processes:  []hypervisor.Process{{Role: "early", PID: 1}},
		Containers: map[string]ContainerState{"c1": {Bundle: "/b", Hooked: true}},
		Timeline:   []Phase{{PhaseShim, time.Unix(1, 0).UTC()}, {PhaseAgent, time.Unix(2, 0).UTC()}},
	}, got); diff != "" {
		t.Error(diff)
	}
	st.close()
	if err := os.Remove(filepath.Join(dir, stateName)); err != nil {
		t.Fatal(err)
	}
	if err := st.process(hypervisor.Process{}); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("written after close: %v %v", entries, err)
	}
}

func TestParseState(t *testing.T) {
	for text, want := range map[string]error{
		`{"version": 1, "id": "x", "unknown": 1}`: nil,
		`{"version": 2}`: errdefs.ErrNotImplemented,
		`{}`:             errdefs.ErrNotImplemented,
		``:               errdefs.ErrDataLoss,
		`{"version": 1`:  errdefs.ErrDataLoss,
		`[]`:             errdefs.ErrDataLoss,
	} {
		if _, err := parseState([]byte(text)); !errors.Is(err, want) {
			t.Errorf("%q: error %v, want %v", text, err, want)
		}
	}
}

func TestDirs(t *testing.T) {
	root := t.TempDir()
	want := filepath.Join(root, "0123456789abcdef")
	for _, dir := range []string{want, filepath.Join(root, "0123456789ABCDEF"), filepath.Join(root, "x")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Dirs(root)
	if diff := cmp.Diff([]string{want}, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if got, err := Dirs(filepath.Join(root, "nowhere")); len(got) > 0 || err != nil {
		t.Error(got, err)
	}
}

// TestRootDiskFull has no room for the state.
func TestRootDiskFull(t *testing.T) {
	e := newEnv(t)
	if err := os.MkdirAll(e.root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", e.root, "tmpfs", 0, "size=8k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(e.root, 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(e.root, "full"), make([]byte, 8<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	s := e.sandbox()
	fails(t, s.Start(t.Context(), testSpec()), unix.ENOSPC, "write state")
	e.clean()
	if len(e.machines) > 0 {
		t.Error("a machine was started")
	}
}

// TestRootDiskFullLater fills the disk when the machine runs.
func TestRootDiskFullLater(t *testing.T) {
	e := newEnv(t)
	if err := os.MkdirAll(e.root, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", e.root, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(e.root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	full := filepath.Join(e.root, "full")
	s := e.running()
	if err := os.WriteFile(full, make([]byte, 64<<10), 0o600); err == nil {
		t.Fatal("there is room")
	}
	_, err := s.CreateContainer(t.Context(), e.config("c1"))
	fails(t, err, unix.ENOSPC)
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	e.nothingOf("c1")
	e.container(s, "c1")
}
