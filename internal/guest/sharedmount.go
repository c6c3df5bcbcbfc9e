package guest

import (
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// A shared mount is a directory or file of a running container, as that sees it,
// in another container of the pod.

func checkSharedMounts(list []*protocol.SharedMount) error {
	for _, m := range list {
		for _, p := range []string{m.GetSrcPath(), m.GetDstPath()} {
			if err := checkPath("shared mount", p); err != nil || p == "/" {
				return invalid("shared mount %q: path %q", bound(m.GetName(), 64), bound(p, 512))
			}
		}
	}
	return nil
}

// addSharedMounts puts them into the container, whose process waits to be
// started. It holds the op lock.
func (c *container) addSharedMounts(list []*protocol.SharedMount, to *process) error {
	for _, m := range list {
		if dst := m.GetDstCtr(); dst != "" && !c.isCalled(dst) {
			continue
		}
		from, err := c.sandbox.running(m.GetSrcCtr())
		if err == nil {
			err = shareMount(from, to, m.GetSrcPath(), m.GetDstPath())
		}
		if err != nil {
			return fmt.Errorf("shared mount %q: %w", bound(m.GetName(), 64), err)
		}
	}
	return nil
}

// running finds the first process of a container by its id or its name in the
// pod.
func (b *sandbox) running(name string) (*process, error) {
	for _, c := range b.all() {
		// What creating sets is not there to be looked at before.
		if st := c.current(); st == creating || !c.isCalled(name) {
			continue
		}
		if p, err := c.process(""); err == nil && !p.ended() {
			return p, nil
		}
	}
	return nil, notFound("running container %q", bound(name, maxID))
}

func shareMount(from, to *process, source, target string) error {
	theirs, err := openNamespace(fmt.Sprintf("/proc/%d/ns/mnt", from.pid))
	if err != nil {
		return err
	}
	defer theirs.close()
	if from.ended() { // and the pid is another process'
		return notFound("process %d", from.pid)
	}
	ours, err := openNamespace(fmt.Sprintf("/proc/%d/ns/mnt", to.pid))
	if err != nil {
		return err
	}
	defer ours.close()
	return thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare root: %w", err)
		}
		// With the namespace comes its root: paths and links do not lead out.
		if err := unix.Setns(int(theirs.file.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("join mounts: %w", err)
		}
		tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return &os.PathError{Op: "clone mount", Path: source, Err: err}
		}
		defer unix.Close(tree)
		var st unix.Stat_t
		if err := unix.Fstat(tree, &st); err != nil {
			return err
		}
		if err := unix.Setns(int(ours.file.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("join mounts: %w", err)
		}
		if err := makeTarget(target, st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
			return err
		}
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS); err != nil {
			return &os.PathError{Op: "move mount", Path: target, Err: err}
		}
		return nil
	})
}

func makeTarget(target string, dir bool) error {
	if dir {
		return os.MkdirAll(target, 0o755)
	}
	if err := os.MkdirAll(path.Dir(target), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}
