package guest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func TestKeptStorages(t *testing.T) {
	var undone []string
	mounters["test"] = func(_ context.Context, m *mountRequest) (func() error, error) {
		return func() error { undone = append(undone, m.rel); return nil }, nil
	}
	defer delete(mounters, "test")
	s := newStorages(Config{Root: t.TempDir()}, nil)
	add := func(storage *protocol.Storage) func() error {
		t.Helper()
		storage.MountPoint = s.cfg.Root + "/" + storage.MountPoint
		release, err := s.add(t.Context(), storage, "c")
		if err != nil {
			t.Fatal(err)
		}
		return release
	}
	shared := func(at string) *protocol.Storage {
		return &protocol.Storage{Driver: "test", Source: "s", MountPoint: at, Shared: true}
	}
	local := func() *protocol.Storage {
		return &protocol.Storage{Driver: "local", Source: "local", MountPoint: "local/dir"}
	}
	releases := []func() error{add(shared("a")), add(shared("a/b")), add(local())}
	file := s.cfg.Root + "/local/dir/f"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, release := range releases {
		if err := release(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(file); err != nil || len(undone) > 0 {
		t.Errorf("%v, undone %v", err, undone)
	}
	// The next container has them again, and somebody else not.
	again := add(local())
	storage := shared("")
	storage.MountPoint, storage.Source = s.cfg.Root+"/a", "other"
	if _, err := s.add(t.Context(), storage, "c"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
	if err := again(); err != nil {
		t.Error(err)
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"a/b", "a"}, undone); diff != "" || len(s.entries) > 0 {
		t.Errorf("%s, %d entries", diff, len(s.entries))
	}
	if _, err := os.Stat(filepath.Dir(file)); !os.IsNotExist(err) {
		t.Errorf("local directory left: %v", err)
	}
}

// Who wants a storage that is being unmounted waits and gets a new one.
func TestStorageThatGoes(t *testing.T) {
	mounted, unmounting, goOn := 0, make(chan struct{}), make(chan struct{})
	mounters["test"] = func(context.Context, *mountRequest) (func() error, error) {
		mounted++
		return func() error { unmounting <- struct{}{}; <-goOn; mounted--; return nil }, nil
	}
	defer delete(mounters, "test")
	s := newStorages(Config{Root: t.TempDir()}, nil)
	storage := &protocol.Storage{Driver: "test", MountPoint: s.cfg.Root + "/x"}
	release, err := s.add(t.Context(), storage, "a")
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() { gone <- release() }()
	<-unmounting
	added := make(chan error, 1)
	go func() {
		var err error
		release, err = s.add(t.Context(), storage, "b")
		added <- err
	}()
	close(goOn)
	if err := <-gone; err != nil {
		t.Error(err)
	}
	if err := <-added; err != nil || mounted != 1 {
		t.Errorf("%v, %d mounted", err, mounted)
	}
	go func() { gone <- release() }()
	<-unmounting
	if err := <-gone; err != nil || mounted != 0 {
		t.Errorf("%v, %d mounted", err, mounted)
	}
}

func TestUpdateEphemeralMounts(t *testing.T) {
	root := t.TempDir()
	sb := newSandbox(Config{Root: root}, nil, nil)
	s := &service{cfg: sb.cfg, sandbox: sb}
	at := root + "/sandbox/shm"
	storage := func(driver string, options ...string) *protocol.Storage {
		return &protocol.Storage{Driver: driver, Source: "shm", Fstype: "tmpfs", MountPoint: at, Options: options}
	}
	release, err := sb.storages.add(t.Context(), storage("ephemeral", "noexec", "nosuid", "nodev", "mode=1777", "size=1m"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := release(); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(at+"/f", make([]byte, 1<<19), 0o600); err != nil {
		t.Fatal(err)
	}
	update := func(storage *protocol.Storage) error {
		_, err := s.UpdateEphemeralMounts(t.Context(), &protocol.UpdateEphemeralMountsRequest{Storages: []*protocol.Storage{storage}})
		return err
	}
	if err := update(storage("ephemeral", "size=3145728", "mode=1777", "fsgid=7")); err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil || st.Blocks*uint64(st.Bsize) != 3<<20 {
		t.Errorf("%d blocks of %d, %v", st.Blocks, st.Bsize, err)
	}
	if want := int64(unix.ST_NOEXEC | unix.ST_NOSUID | unix.ST_NODEV); st.Flags&want != want {
		t.Errorf("flags %#x", st.Flags)
	}
	if info, err := os.Stat(at + "/f"); err != nil || info.Size() != 1<<19 {
		t.Errorf("what was in it: %v, %v", info, err)
	}
	for why, tt := range map[string]struct {
		storage *protocol.Storage
		class   func(error) bool
	}{
		"too small":      {storage("ephemeral", "size=4096"), errdefs.IsFailedPrecondition},
		"not a size":     {storage("ephemeral", "size=lots"), errdefs.IsInvalidArgument},
		"another driver": {storage("bind", "size=1m"), errdefs.IsInvalidArgument},
		"not mounted":    {&protocol.Storage{Driver: "ephemeral", MountPoint: root + "/x", Options: []string{"size=1m"}}, errdefs.IsNotFound},
		"outside":        {&protocol.Storage{Driver: "ephemeral", MountPoint: "/dev/shm", Options: []string{"size=1m"}}, errdefs.IsInvalidArgument},
	} {
		if err := update(tt.storage); !tt.class(err) {
			t.Errorf("%s: %v", why, err)
		}
	}
}

func TestVirtiofsMounts(t *testing.T) {
	const table = `24 1 0:22 / / rw - tmpfs tmpfs rw
30 24 0:30 / /run/kata-containers/shared/containers rw,relatime shared:3 - virtiofs kataShared rw
31 30 0:31 / /run/kata-containers/shared/containers/a\040b\134/rootfs rw,relatime - virtiofs none rw
32 30 0:32 / /x rw - virtiofsx none rw
short 0:1 - virtiofs
33 30 a:b / /y rw - virtiofs none rw
`
	want := []submount{{"/run/kata-containers/shared/containers", 0, 30}, {`/run/kata-containers/shared/containers/a b\/rootfs`, 0, 31}}
	if diff := cmp.Diff(want, virtiofsMounts(table), cmp.AllowUnexported(submount{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for in, want := range map[string]string{`\`: `\`, `a\0`: `a\0`, `\040`: " ", `\999`: `\999`, `\0400`: " 0", `\777`: `\777`} {
		if got := unescape(in); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}

func TestStaleMount(t *testing.T) {
	dir := t.TempDir()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	m := submount{dir, unix.Major(st.Dev), unix.Minor(st.Dev)}
	if m.isStale() {
		t.Error("what is there is stale")
	}
	if !(submount{dir + "/gone", m.major, m.minor}).isStale() || !(submount{dir, m.major, m.minor + 1}).isStale() {
		t.Error("what is gone is not stale")
	}
	if err := m.remove(); err != nil { // it is no mount
		t.Error(err)
	}
}

func TestTerminationLog(t *testing.T) {
	root := t.TempDir()
	makeTree(t, root, map[string]string{
		"rootfs/dev/termination-log": "in the root", "rootfs/link": "->/dev/termination-log", "rootfs/out": "->../../secret",
		"rootfs/big": strings.Repeat("x", maxDiagnostics) + "end", "secret": "s", "logs/c": "mounted", "logs/l": "->../secret",
	})
	sb := newSandbox(Config{Root: root}, nil, nil)
	log := func(annotation, mounted string) ([]byte, error) {
		spec := &protocol.Spec{Root: &protocol.Root{Path: root + "/rootfs"}, Annotations: map[string]string{}}
		at := terminationPath
		if annotation != "" {
			spec.Annotations[terminationAnnotation] = annotation
			at = annotation
		}
		if mounted != "" {
			spec.Mounts = []*protocol.Mount{{Destination: at, Source: mounted}}
		}
		c := newContainer(sb, "c")
		c.state, c.about = created, newAbout(spec)
		return c.terminationLog()
	}
	for _, tt := range []struct{ annotation, mounted, want string }{
		{"", "", "in the root"},
		{"/link", "", "in the root"},
		{"/dev/../link", "", "in the root"},
		{"", root + "/logs/c", "mounted"},
		{"", "/etc/hostname", "in the root"}, // not the agent's to read
	} {
		if b, err := log(tt.annotation, tt.mounted); err != nil || string(b) != tt.want {
			t.Errorf("%+v: %q, %v", tt, b, err)
		}
	}
	for _, tt := range []struct{ annotation, mounted string }{
		{"/out", ""}, {"/../secret", ""}, {"/dev", ""}, {"/none", ""}, {"", root + "/logs/l"}, {"", root + "/logs/none"},
	} {
		if b, err := log(tt.annotation, tt.mounted); err == nil {
			t.Errorf("%+v: read %q", tt, b)
		}
	}
	if b, err := log("/big", ""); err != nil || len(b) != maxDiagnostics || !strings.HasSuffix(string(b), "end") {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if _, err := (&service{sandbox: sb}).GetDiagnosticData(t.Context(), &protocol.GetDiagnosticDataRequest{LogType: "core"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}

// A mount of one mount namespace gets into another.
func TestShareMount(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, map[string]string{"src/": "", "file": "x"})
	start := func(script string) *process {
		t.Helper()
		cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script+"; echo; exec sleep 100")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		if _, err := out.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		return &process{pid: cmd.Process.Pid, done: make(chan struct{})}
	}
	from := start("mount -t tmpfs x " + dir + "/src; mkdir " + dir + "/src/sub; mount -t tmpfs y " + dir + "/src/sub; echo hi > " + dir + "/src/sub/f")
	to := start("true")
	if err := shareMount(from, to, dir+"/src", dir+"/new/dst"); err != nil {
		t.Fatal(err)
	}
	if err := shareMount(from, to, dir+"/file", dir+"/newfile"); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/new/dst/sub/f": "hi\n", "/newfile": "x"} {
		if b, err := os.ReadFile("/proc/" + strconv.Itoa(to.pid) + "/root" + dir + path); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
	if table, _ := os.ReadFile("/proc/thread-self/mountinfo"); strings.Contains(string(table), dir) {
		t.Error("the agent has the mount")
	}
	if err := shareMount(from, to, dir+"/none", dir+"/x"); err == nil {
		t.Error("shared nothing")
	}
	close(from.done)
	if err := shareMount(from, to, dir+"/src", dir+"/x"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	for _, bad := range []*protocol.SharedMount{
		{SrcPath: "/a", DstPath: "/"}, {SrcPath: "a", DstPath: "/b"}, {SrcPath: "/a", DstPath: "/b/../c"}, {},
	} {
		if err := checkSharedMounts([]*protocol.SharedMount{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
