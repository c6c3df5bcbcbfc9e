package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/cleanup"
)

// attachMacvtap puts a macvtap upon the link, which gives it all frames and its
// MAC (passthru). It lasts until it is removed.
func (n *Namespace) attachMacvtap(target netlink.Link, owner string, queues int, undo *cleanup.Stack) ([]*os.File, error) {
	name := tapName(target.Attrs().Index)
	attrs := netlink.NewLinkAttrs() // with the length of queue that the kernel gives
	attrs.Name, attrs.ParentIndex = name, target.Attrs().Index
	tap := &netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_PASSTHRU}}
	if err := n.handle.LinkAdd(tap); err != nil {
		return nil, fmt.Errorf("add macvtap %q: %w", name, err)
	}
	undo.Add(func() error { return n.removeTap(name) })
	if _, err := n.setTap(name, owner, target.Attrs().MTU); err != nil {
		return nil, err
	}
	var files []*os.File
	err := n.inside(func() error {
		node, remove, err := deviceNode(name)
		if err != nil {
			return err
		}
		defer remove()
		for i := range queues {
			f, err := openQueue(node, name, false, queues > 1)
			if err != nil {
				return fmt.Errorf("queue %d: %w", i, err)
			}
			files = append(files, f)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open macvtap %q: %w", name, err), closeAll(files))
	}
	return files, nil
}

// deviceNode makes the character device of a macvtap. Its numbers are in the
// sysfs of its network namespace only, which the calling thread mounts for
// itself: it is in that namespace, and ends afterwards.
func deviceNode(link string) (path string, remove func(), err error) {
	dir, err := os.MkdirTemp("", "vmshim-macvtap")
	if err != nil {
		return "", nil, err
	}
	remove = func() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		_ = os.RemoveAll(dir)
	}
	defer func() {
		if err != nil {
			remove()
		}
	}()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return "", nil, os.NewSyscallError("unshare", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", nil, fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("sysfs", dir, "sysfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return "", nil, fmt.Errorf("mount sysfs: %w", err)
	}
	found, err := filepath.Glob(filepath.Join(dir, "class/net", link, "tap*", "dev"))
	if err != nil || len(found) != 1 {
		return "", nil, fmt.Errorf("device of %q in sysfs: %d found", link, len(found))
	}
	text, err := os.ReadFile(found[0])
	if err != nil {
		return "", nil, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(strings.TrimSpace(string(text)), "%d:%d", &major, &minor); err != nil {
		return "", nil, fmt.Errorf("device number %q: %w", text, err)
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		return "", nil, fmt.Errorf("unmount sysfs: %w", err)
	}
	// The directory's own file system may allow no devices, as systemd's /tmp.
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700,size=64k"); err != nil {
		return "", nil, fmt.Errorf("mount tmpfs: %w", err)
	}
	path = filepath.Join(dir, "tap")
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return "", nil, &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return path, remove, nil
}
