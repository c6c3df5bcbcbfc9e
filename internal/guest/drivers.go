package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// A mountRequest is one storage, its mount point also relative to the directory
// below which all of them are.
type mountRequest struct {
	*protocol.Storage
	storages    *storages
	root, rel   string
	containerID string
}

// overlayRW asks for an upper layer in the guest's memory.
const overlayRW = "io.katacontainers.fs-opt.overlay-rw"

func mountVirtioFS(ctx context.Context, m *mountRequest) (func() error, error) {
	undo, err := m.mount(m.GetSource(), "virtiofs", m.GetOptions())
	if err != nil {
		return nil, err
	}
	if err := readAhead(m.GetMountPoint()); err != nil {
		log.G(ctx).WithError(err).Warnf("share at %s is slower: the kernel reads ahead by its own measure", m.GetMountPoint())
	}
	return undo, nil
}

// shareReadAhead is how much the kernel reads of a share at once when a program
// touches its text, or a file is read from its beginning. The kernel's own measure
// is 128 KiB (VM_READAHEAD_PAGES); what a share costs is the way to the host and
// back, not the bytes. FUSE carries no more than 1 MiB (FUSE_MAX_MAX_PAGES).
const shareReadAhead = 1 << 20

func readAhead(mountPoint string) error {
	var st unix.Stat_t
	if err := unix.Stat(mountPoint, &st); err != nil {
		return fmt.Errorf("stat %s: %w", mountPoint, err)
	}
	bdi := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	return os.WriteFile(bdi, strconv.AppendInt(nil, shareReadAhead>>10, 10), 0)
}

// mountBlock mounts a disk by its PCI path or by the path of its node.
func mountBlock(ctx context.Context, m *mountRequest) (func() error, error) {
	n, err := m.storages.devices.anyDisk(ctx, m.GetSource())
	if err != nil {
		return nil, err
	}
	return m.mountDisk(n)
}

func mountSCSI(ctx context.Context, m *mountRequest) (func() error, error) {
	address, err := parseSCSI(m.GetSource())
	if err != nil {
		return nil, err
	}
	n, err := m.storages.devices.scsiDisk(ctx, address)
	if err != nil {
		return nil, err
	}
	return m.mountDisk(n)
}

func (m *mountRequest) mountDisk(n node) (func() error, error) {
	if m.GetFstype() == "bind" { // the disk itself, not what is on it
		return m.mount(n.path, "", append(m.GetOptions(), "bind"))
	}
	return m.mount(n.path, m.GetFstype(), m.GetOptions())
}

// mountEphemeral mounts memory: a tmpfs, or huge pages.
func mountEphemeral(ctx context.Context, m *mountRequest) (func() error, error) {
	kind := m.GetFstype()
	if kind == "" {
		kind = "tmpfs"
	}
	if kind != "tmpfs" && kind != "hugetlbfs" {
		return nil, invalid("ephemeral storage of type %q", kind)
	}
	options, gid, err := splitGroup(m.GetOptions())
	if err != nil {
		return nil, err
	}
	var undo cleanup.Stack
	if kind == "hugetlbfs" {
		pages, err := parseHugePages(options)
		if err != nil {
			return nil, err
		}
		if err := m.storages.allocate(ctx, pages); err != nil {
			return nil, err
		}
		undo.Add(func() error { return m.storages.free(pages) })
		options = pages.options
	}
	unmount, err := m.mount(m.GetSource(), kind, options)
	if unmount != nil {
		undo.Add(unmount)
	}
	if err == nil && gid >= 0 {
		err = m.inRoot(func(root *os.Root) error { return shareWith(root, m.rel, gid) })
	}
	return undo.Run, err
}

// makeLocal makes a directory on what is mounted already.
func makeLocal(_ context.Context, m *mountRequest) (func() error, error) {
	options, gid, err := splitGroup(m.GetOptions())
	if err != nil {
		return nil, err
	}
	mode := fs.FileMode(0o755)
	for _, o := range options {
		if v, ok := strings.CutPrefix(o, "mode="); ok {
			n, err := strconv.ParseUint(v, 8, 12)
			if err != nil {
				return nil, invalid("mode %q", v)
			}
			mode = fs.FileMode(n)
		}
	}
	err = m.inRoot(func(root *os.Root) error {
		if err := root.MkdirAll(m.rel, 0o755); err != nil {
			return err
		}
		if err := root.Chmod(m.rel, mode); err != nil || gid < 0 {
			return err
		}
		return shareWith(root, m.rel, gid)
	})
	return func() error {
		return m.inRoot(func(root *os.Root) error { return root.RemoveAll(m.rel) })
	}, err
}

func mountOverlay(_ context.Context, m *mountRequest) (func() error, error) {
	var options []string
	rw := false
	for _, o := range m.GetOptions() {
		if o == overlayRW {
			rw = true
			continue
		}
		options = append(options, o)
	}
	if !rw {
		return m.mount("overlay", "overlay", options)
	}
	if m.containerID == "" {
		return nil, invalid("overlay with an upper layer outside a container")
	}
	layers := filepath.Join("sandbox", "overlay", m.containerID)
	for _, dir := range []string{"upper", "work"} {
		rel := filepath.Join(layers, dir)
		if err := m.inRoot(func(root *os.Root) error { return root.MkdirAll(rel, 0o755) }); err != nil {
			return nil, err
		}
		options = append(options, dir+"dir="+filepath.Join(m.root, rel))
	}
	undo, err := m.mount("overlay", "overlay", options)
	return func() error {
		var uerr error
		if undo != nil {
			uerr = undo()
		}
		return errors.Join(uerr, m.inRoot(func(root *os.Root) error { return root.RemoveAll(layers) }))
	}, err
}

func mountBind(_ context.Context, m *mountRequest) (func() error, error) {
	if err := checkPath("source", m.GetSource()); err != nil {
		return nil, err
	}
	return m.mount(m.GetSource(), "", append(m.GetOptions(), "bind"))
}

// mount mounts at the request's mount point, which is made and cannot be changed
// into something else meanwhile.
func (m *mountRequest) mount(source, kind string, options []string) (func() error, error) {
	flags, data := mountOptions(options)
	file := kind == "" && isFile(source)
	var target string
	err := m.inRoot(func(root *os.Root) error {
		f, err := mountPoint(root, m.rel, file)
		if err != nil {
			return err
		}
		defer f.Close()
		target = fmt.Sprintf("/proc/self/fd/%d", f.Fd())
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			return fmt.Errorf("mount: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	undo := func() error { return errors.Join(unmount(m.GetMountPoint()), m.removeMountPoint()) }
	if flags&unix.MS_BIND != 0 && flags&^(unix.MS_BIND|unix.MS_REC) != 0 {
		// The first call of a bind mount does not look at other flags.
		if err := unix.Mount("", m.GetMountPoint(), "", flags|unix.MS_REMOUNT, ""); err != nil {
			return nil, errors.Join(fmt.Errorf("remount: %w", err), undo())
		}
	}
	return undo, nil
}

// removeMountPoint takes away what mount made, unless it is in use or the host's.
func (m *mountRequest) removeMountPoint() error {
	if strings.HasPrefix(m.rel, "shared/") {
		return nil
	}
	return m.inRoot(func(root *os.Root) error {
		_ = root.Remove(m.rel)
		return nil
	})
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.IsDir()
}

func mountPoint(root *os.Root, rel string, file bool) (*os.File, error) {
	if !file {
		if err := root.MkdirAll(rel, 0o755); err != nil {
			return nil, err
		}
		return root.OpenFile(rel, unix.O_PATH|unix.O_DIRECTORY, 0)
	}
	if err := root.MkdirAll(filepath.Dir(rel), 0o755); err != nil {
		return nil, err
	}
	f, err := root.OpenFile(rel, os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return nil, err
	}
	f.Close()
	return root.OpenFile(rel, unix.O_PATH, 0)
}

func (m *mountRequest) inRoot(f func(*os.Root) error) error {
	root, err := os.OpenRoot(m.root)
	if err != nil {
		return err
	}
	defer root.Close()
	return f(root)
}

// unmount detaches what is still in use: its users keep it, and nobody new gets it.
func unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}

// mountFlags are the options that are flags; clear says that a flag is taken back.
var mountFlags = map[string]struct {
	flag  uintptr
	clear bool
}{
	"ro": {unix.MS_RDONLY, false}, "rw": {unix.MS_RDONLY, true},
	"nosuid": {unix.MS_NOSUID, false}, "suid": {unix.MS_NOSUID, true},
	"nodev": {unix.MS_NODEV, false}, "dev": {unix.MS_NODEV, true},
	"noexec": {unix.MS_NOEXEC, false}, "exec": {unix.MS_NOEXEC, true},
	"sync": {unix.MS_SYNCHRONOUS, false}, "async": {unix.MS_SYNCHRONOUS, true},
	"noatime": {unix.MS_NOATIME, false}, "atime": {unix.MS_NOATIME, true},
	"nodiratime": {unix.MS_NODIRATIME, false}, "diratime": {unix.MS_NODIRATIME, true},
	"relatime": {unix.MS_RELATIME, false}, "norelatime": {unix.MS_RELATIME, true},
	"strictatime": {unix.MS_STRICTATIME, false}, "dirsync": {unix.MS_DIRSYNC, false},
	"bind": {unix.MS_BIND, false}, "rbind": {unix.MS_BIND | unix.MS_REC, false},
	"defaults": {0, false},
}

// mountOptions splits options into flags and what the file system reads itself.
func mountOptions(options []string) (flags uintptr, data string) {
	var rest []string
	for _, o := range options {
		f, ok := mountFlags[o]
		switch {
		case !ok && o != "":
			rest = append(rest, o)
		case f.clear:
			flags &^= f.flag
		default:
			flags |= f.flag
		}
	}
	return flags, strings.Join(rest, ",")
}

// splitGroup takes fsgid=N out of the options; -1 is none.
func splitGroup(options []string) (rest []string, gid int, err error) {
	gid = -1
	for _, o := range options {
		v, ok := strings.CutPrefix(o, "fsgid=")
		if !ok {
			rest = append(rest, o)
			continue
		}
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return nil, 0, invalid("option %q", o)
		}
		gid = int(n)
	}
	return rest, gid, nil
}

// shareWith gives a directory to a group, and what will be made in it.
func shareWith(root *os.Root, rel string, gid int) error {
	info, err := root.Stat(rel)
	if err != nil {
		return err
	}
	if err := root.Chown(rel, -1, gid); err != nil {
		return err
	}
	return root.Chmod(rel, info.Mode()&(fs.ModePerm|fs.ModeSticky)|0o070|fs.ModeSetgid)
}

// applyGroup makes a whole volume a group's. With OnRootMismatch that is skipped
// when its root is right already.
func applyGroup(dir, rel string, group *protocol.FSGroup) error {
	if group == nil {
		return nil
	}
	root, err := os.OpenRoot(filepath.Join(dir, rel))
	if err != nil {
		return err
	}
	defer root.Close()
	gid := int(group.GetGroupId())
	var st unix.Stat_t
	if err := unix.Stat(root.Name(), &st); err != nil {
		return err
	}
	if group.GetGroupChangePolicy() == protocol.FSGroupChangePolicy_OnRootMismatch &&
		int(st.Gid) == gid && st.Mode&(unix.S_ISGID|0o070) == unix.S_ISGID|0o070 {
		return nil
	}
	return fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return shareWith(root, path, gid)
		case d.Type().IsRegular():
			return root.Chown(path, -1, gid)
		}
		return root.Lchown(path, -1, gid)
	})
}
