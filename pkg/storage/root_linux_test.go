package storage

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
)

// private runs the calling test again in a mount namespace of its own, and
// says whether this is that second run.
func private(t *testing.T) bool {
	t.Helper()
	need.Root(t)
	const mark = "VMSHIM_TEST_PRIVATE"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), mark+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

func mounts(t *testing.T, dir string) []*mountinfo.Info {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Fatal(err)
	}
	return infos
}

func tmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// plan looks, plans and applies, and removes the share at the end.
func plan(t *testing.T, share string, c Container) *Plan {
	t.Helper()
	f, err := Look(share, c)
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewPlan(c, f)
	if err != nil {
		t.Fatal(err)
	}
	if err := Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	return p
}

func newShare(t *testing.T) string {
	t.Helper()
	share := filepath.Join(t.TempDir(), "share")
	if err := MakeShare(share); err != nil {
		t.Fatal(err)
	}
	return share
}

func TestRootApply(t *testing.T) {
	if !private(t) {
		return
	}
	src := t.TempDir()
	write(t, src+"/lower/etc/name", "lower")
	write(t, src+"/data/file", "data")
	write(t, src+"/hosts", "hosts")
	for _, dir := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(src, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tmpfs(t, src+"/data/sub")
	write(t, src+"/data/sub/file", "sub")

	share := newShare(t)
	c := Container{
		ID: "c1",
		Rootfs: []Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + src + "/lower", "upperdir=" + src + "/upper", "workdir=" + src + "/work",
		}}},
		Mounts: []specs.Mount{
			{Destination: "/rw", Type: "bind", Source: src + "/data", Options: []string{"rbind"}},
			{Destination: "/ro", Type: "bind", Source: src + "/data", Options: []string{"rbind", "ro"}},
			{Destination: "/rro", Type: "bind", Source: src + "/data", Options: []string{"rbind", "rro"}},
			{Destination: "/top", Type: "bind", Source: src + "/data", Options: []string{"bind"}},
			{Destination: "/hosts", Type: "bind", Source: src + "/hosts", Options: []string{"bind", "ro"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"},
		},
	}
	p := plan(t, share, c)
	at := func(parts ...string) string { return filepath.Join(append([]string{p.Dir}, parts...)...) }

	for path, want := range map[string]string{
		at("rootfs", "etc", "name"): "lower", at("0", "file"): "data", at("0", "sub", "file"): "sub",
		at("4"): "hosts", at("2", "sub", "file"): "sub",
	} {
		if got := read(t, path); got != want {
			t.Errorf("%s has %q, want %q", path, got, want)
		}
	}
	if _, err := os.Stat(at("3", "sub", "file")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a plain bind shows what is mounted below: %v", err)
	}
	for path, want := range map[string]error{
		at("rootfs", "new"): nil, at("0", "new"): nil, at("0", "sub", "new"): nil,
		at("1", "new"): unix.EROFS, at("1", "sub", "new"): nil,
		at("2", "new"): unix.EROFS, at("2", "sub", "new"): unix.EROFS, at("4"): unix.EROFS,
	} {
		if err := os.WriteFile(path, []byte("new"), 0o644); !errors.Is(err, want) {
			t.Errorf("write %s: %v, want %v", path, err, want)
		}
	}

	// Mounted later on the host: not for this container.
	tmpfs(t, src+"/data/later")
	write(t, src+"/data/later/file", "later")
	if _, err := os.Stat(at("0", "later", "file")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a private mount shows what the host mounted later: %v", err)
	}

	if err := RemoveShare(share); err != nil {
		t.Fatal(err)
	}
	if left := mounts(t, share); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := os.Stat(share); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if got := read(t, src+"/data/sub/file"); got != "sub" {
		t.Error("the source was touched")
	}
	if err := RemoveShare(share); err != nil {
		t.Errorf("again: %v", err)
	}
}

// TestRootServerSees runs a process in a mount namespace that receives what
// the share propagates, as virtiofsd is.
func TestRootServerSees(t *testing.T) {
	if !private(t) {
		return
	}
	src := t.TempDir()
	tmpfs(t, src) // shared, as the mounts of a host with systemd are
	if err := unix.Mount("", src, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	write(t, src+"/slave/file", "slave")
	write(t, src+"/private/file", "private")
	share := newShare(t)

	server := exec.CommandContext(t.Context(), "sh", "-c",
		`mount --make-rslave / && echo up && while read cmd; do eval "$cmd"; echo; done`)
	server.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	in, err := server.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = in.Close()
		if err := server.Wait(); err != nil {
			t.Error(err)
		}
	}()
	line := func() string {
		var b []byte
		for one := make([]byte, 1); ; {
			if _, err := out.Read(one); err != nil || one[0] == '\n' {
				return string(b)
			}
			b = append(b, one[0])
		}
	}
	ask := func(cmd string) string {
		if _, err := in.Write([]byte(cmd + "\n")); err != nil {
			t.Fatal(err)
		}
		return line()
	}
	if got := line(); got != "up" {
		t.Fatalf("server said %q", got)
	}

	p := plan(t, share, Container{
		ID: "c1", Root: &specs.Root{Path: src + "/private"},
		Mounts: []specs.Mount{
			{Destination: "/a", Type: "bind", Source: src + "/slave", Options: []string{"rbind", "rslave", "ro"}},
			{Destination: "/b", Type: "bind", Source: src + "/private", Options: []string{"rbind", "rprivate"}},
		},
	})
	if got := ask("cat " + p.Dir + "/0/file " + p.Dir + "/1/file | tr -d '\\n'"); got != "slaveprivate" {
		t.Errorf("server reads %q", got)
	}
	if got := ask("echo x 2>&- >" + p.Dir + "/0/file || printf refused"); got != "refused" {
		t.Errorf("server's write to a read-only bind: %q", got)
	}
	for name, want := range map[string]string{"slave/later": "later", "private/later": "none"} {
		tmpfs(t, filepath.Join(src, name))
		write(t, filepath.Join(src, name, "file"), "later")
		at := p.Dir + "/" + map[string]string{"slave/later": "0", "private/later": "1"}[name] + "/later/file"
		if got := ask("cat " + at + " 2>&- || printf none"); got != want {
			t.Errorf("server reads %q from what was mounted at %s, want %q", got, name, want)
		}
	}
	// It keeps the mounts busy, as a server with a guest's open files does.
	ask("exec 9<" + p.Dir + "/1/file")
	if err := Remove(p.Dir); err != nil {
		t.Fatal(err)
	}
	if got := ask("grep -c " + p.Dir + "/ /proc/self/mountinfo"); got != "0" {
		t.Errorf("server still has %s mounts", got)
	}
	if left := mounts(t, p.Dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := RemoveShare(share); err != nil {
		t.Fatal(err)
	}
}

// TestRootShareInSource mounts a directory that has the share itself inside,
// as a bind mount of the host's root has.
func TestRootShareInSource(t *testing.T) {
	if !private(t) {
		return
	}
	top := t.TempDir()
	share := filepath.Join(top, "share")
	if err := MakeShare(share); err != nil {
		t.Fatal(err)
	}
	for _, propagation := range []string{"rprivate", "rslave"} {
		p := plan(t, share, Container{
			ID: propagation, Root: &specs.Root{Path: t.TempDir()},
			Mounts: []specs.Mount{{Destination: "/host", Type: "bind", Source: top, Options: []string{"rbind", propagation}}},
		})
		if n := len(mounts(t, share)); n > 20 {
			t.Errorf("%s: %d mounts", propagation, n)
		}
		if err := Remove(p.Dir); err != nil {
			t.Errorf("%s: %v", propagation, err)
		}
	}
	if err := RemoveShare(share); err != nil {
		t.Fatal(err)
	}
	if left := mounts(t, share); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestRootApplyUndone(t *testing.T) {
	if !private(t) {
		return
	}
	share := newShare(t)
	c := Container{ID: "c1", Root: &specs.Root{Path: t.TempDir()}}
	f, err := Look(share, c)
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewPlan(c, f)
	if err != nil {
		t.Fatal(err)
	}
	p.Host = append(p.Host, HostMount{Name: "0", Mounts: []Mount{{Type: "nosuchfs", Source: "x"}}})
	if err := Apply(t.Context(), p); err == nil || !strings.Contains(err.Error(), "nosuchfs") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(p.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	if left := mounts(t, p.Dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := RemoveShare(share); err != nil {
		t.Fatal(err)
	}
}

// TestRootOldBind is what kernels before 5.12 get.
func TestRootOldBind(t *testing.T) {
	if !private(t) {
		return
	}
	src := t.TempDir()
	write(t, src+"/f", "data")
	tmpfs(t, src+"/sub")
	write(t, src+"/sub/f", "sub")
	share := newShare(t)
	for name, b := range map[string]*Bind{
		"rw": {Source: src, Recursive: true}, "ro": {Source: src, ReadOnly: true},
	} {
		target := filepath.Join(share, name)
		if err := placeholder(target, false); err != nil {
			t.Fatal(err)
		}
		if err := b.makeOld(target); err != nil {
			t.Fatal(err)
		}
		var want error
		if b.ReadOnly {
			want = unix.EROFS
		}
		if err := os.WriteFile(target+"/new", nil, 0o644); !errors.Is(err, want) {
			t.Errorf("%s: write: %v, want %v", name, err, want)
		}
		if _, err := os.Stat(target + "/sub/f"); (err == nil) != b.Recursive {
			t.Errorf("%s: what is mounted below: %v", name, err)
		}
	}
	if err := (&Bind{Source: "/nowhere"}).makeOld(filepath.Join(share, "rw")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := RemoveShare(share); err != nil {
		t.Fatal(err)
	}
}

func TestLookMissing(t *testing.T) {
	c := Container{ID: "c1", Bundle: t.TempDir(), Root: &specs.Root{Path: "rootfs"}}
	f, err := Look("/share", c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewPlan(c, f); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("error %v", err)
	}
}
