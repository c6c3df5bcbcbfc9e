package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// makeTree makes files, directories (a name ending in /) and links (->).
func makeTree(t *testing.T, dir string, tree map[string]string) {
	t.Helper()
	for name, text := range tree {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch to, isLink := strings.CutPrefix(text, "->"); {
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(path, 0o750)
		case isLink:
			err = os.Symlink(to, path)
		default:
			err = os.WriteFile(path, []byte(text), 0o640)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// listTree is the opposite.
func listTree(t *testing.T, dir string) string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		switch {
		case d.IsDir():
			name += "/"
		case d.Type()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(path)
			name += "->" + to
		default:
			b, _ := os.ReadFile(path)
			info, _ := d.Info()
			name += fmt.Sprintf("=%s(%o)", b, info.Mode().Perm())
		}
		list = append(list, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(list, " ")
}

func TestMirror(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	makeTree(t, from, map[string]string{
		"..1/a": "old a", "..1/b": "old b", "..data": "->..1", "a": "->..data/a", "b": "->..data/b", "dangling": "->nowhere", "empty/": "",
	})
	if err := unix.Mkfifo(from+"/pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	var c mirror
	var err error
	if c.from, err = os.OpenRoot(from); err != nil {
		t.Fatal(err)
	}
	if c.to, err = os.OpenRoot(to); err != nil {
		t.Fatal(err)
	}
	defer c.close()
	sync := func(want string) {
		t.Helper()
		tree, err := scanTree(c.from.FS(), 100, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.apply(tree); err != nil {
			t.Fatal(err)
		}
		if got := listTree(t, to); got != want {
			t.Errorf("copy is\n%s\nwant\n%s", got, want)
		}
	}
	sync("..1/ ..1/a=old a(640) ..1/b=old b(640) ..data->..1 a->..data/a b->..data/b dangling->nowhere empty/")
	var before unix.Stat_t
	if err := unix.Stat(to+"/..1/a", &before); err != nil {
		t.Fatal(err)
	}
	sync("..1/ ..1/a=old a(640) ..1/b=old b(640) ..data->..1 a->..data/a b->..data/b dangling->nowhere empty/")
	var after unix.Stat_t
	if err := unix.Stat(to+"/..1/a", &after); err != nil || before.Ino != after.Ino {
		t.Errorf("copied again without a change: %v", err)
	}

	// As the kubelet changes a volume; the container sees it by inotify.
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, to, unix.IN_MOVED_TO|unix.IN_DELETE); err != nil {
		t.Fatal(err)
	}
	makeTree(t, from, map[string]string{"..2/a": "new a", "..2/c": "new c", "..tmp": "->..2", "c": "->..data/c"})
	if err := os.Rename(from+"/..tmp", from+"/..data"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"..1", "b", "dangling", "empty"} {
		if err := os.RemoveAll(filepath.Join(from, name)); err != nil {
			t.Fatal(err)
		}
	}
	sync("..2/ ..2/a=new a(640) ..2/c=new c(640) ..data->..2 a->..data/a c->..data/c")
	events := inotifyNames(t, watch)
	if !strings.HasPrefix(events, "+..data ") || !strings.Contains(events, " -..1 ") {
		t.Errorf("inotify told %s", events)
	}

	// A name that becomes another kind of thing.
	makeTree(t, from, map[string]string{"d/f": "x"})
	sync("..2/ ..2/a=new a(640) ..2/c=new c(640) ..data->..2 a->..data/a c->..data/c d/ d/f=x(640)")
	if err := errors.Join(os.RemoveAll(from+"/d"), os.WriteFile(from+"/d", []byte("y"), 0o600)); err != nil {
		t.Fatal(err)
	}
	sync("..2/ ..2/a=new a(640) ..2/c=new c(640) ..data->..2 a->..data/a c->..data/c d=y(600)")
	if err := errors.Join(os.Remove(from+"/d"), os.Mkdir(from+"/d", 0o700)); err != nil {
		t.Fatal(err)
	}
	sync("..2/ ..2/a=new a(640) ..2/c=new c(640) ..data->..2 a->..data/a c->..data/c d/")

	for _, limit := range []struct{ entries, bytes int }{{3, 1000}, {100, 5}} {
		if _, err := scanTree(c.from.FS(), limit.entries, int64(limit.bytes)); !errors.Is(err, errTooBig) {
			t.Errorf("%v: %v", limit, err)
		}
	}
}

// inotifyNames lists what came (+) and went (-).
func inotifyNames(t *testing.T, fd int) string {
	t.Helper()
	buf := make([]byte, 8<<10)
	n, err := unix.Read(fd, buf)
	if err != nil {
		t.Fatal(err)
	}
	var names string
	for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		sign := "+"
		if binary.NativeEndian.Uint32(b[4:])&unix.IN_DELETE != 0 {
			sign = "-"
		}
		names += sign + strings.TrimRight(string(b[unix.SizeofInotifyEvent:size]), "\x00") + " "
		b = b[size:]
	}
	return names
}

// What is small is copied, and again when it changes; what is not is mounted.
func TestWatchableBind(t *testing.T) {
	root, source := t.TempDir(), t.TempDir()
	makeTree(t, source, map[string]string{"f": "1"})
	s := newStorages(Config{Root: root}, nil)
	target := root + "/watched/v"
	use := func(source string) (release func() error) {
		t.Helper()
		release, err := s.add(t.Context(), &protocol.Storage{Driver: "watchable-bind", Source: source, MountPoint: target}, "c")
		if err != nil {
			t.Fatal(err)
		}
		return release
	}
	release := use(source)
	if got := listTree(t, target); got != "f=1(640)" || mountType(t, target) != unix.TMPFS_MAGIC {
		t.Errorf("got %s on %#x", got, mountType(t, target))
	}
	if err := os.WriteFile(source+"/f", []byte("22"), 0o640); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if listTree(t, target) == "f=22(640)" {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if got := listTree(t, target); got != "f=22(640)" {
		t.Errorf("never changed: %s", got)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}

	if err := os.Truncate(source+"/f", watchBytes+1); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{source, source + "/f"} {
		release = use(path)
		var a, b unix.Stat_t
		if err := errors.Join(unix.Stat(path, &a), unix.Stat(target, &b)); err != nil || a.Ino != b.Ino || a.Dev != b.Dev {
			t.Errorf("%s is not mounted itself: %v", path, err)
		}
		if err := release(); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.add(t.Context(), &protocol.Storage{Driver: "watchable-bind", Source: source + "/none", MountPoint: target}, "c"); err == nil || len(s.entries) > 0 {
		t.Errorf("nothing was mounted: %v, %d entries", err, len(s.entries))
	}
}

func mountType(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Type
}
