package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Apply makes the mounts of a plan on the host. On error or cancel nothing of
// them is left. Remove(p.Dir) undoes it.
func Apply(ctx context.Context, p *Plan) (err error) {
	if err := os.Mkdir(p.Dir, 0o755); err != nil {
		return fmt.Errorf("share: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Remove(p.Dir))
		}
	}()
	for _, m := range p.Host {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.make(filepath.Join(p.Dir, m.Name)); err != nil {
			return fmt.Errorf("share %s: %w", m.Name, err)
		}
	}
	return nil
}

func (m HostMount) make(target string) error {
	if err := placeholder(target, m.File); err != nil {
		return err
	}
	if m.Bind != nil {
		return m.Bind.make(target)
	}
	for _, mm := range m.Mounts {
		one := mount.Mount{Type: mm.Type, Source: mm.Source, Target: mm.Target, Options: mm.Options}
		if err := one.Mount(target); err != nil {
			return fmt.Errorf("mount %s %q: %w", mm.Type, mm.Source, err)
		}
	}
	return nil
}

// placeholder makes what a mount hides.
func placeholder(target string, file bool) error {
	if !file {
		return os.Mkdir(target, 0o755)
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// make prepares the mount before it is anywhere, so that it appears below the
// share at once as it shall be, read-only for one. The share is propagated to
// its server; being attached there makes the mount propagate as well, whatever
// it was before, and so only its connection with the source is decided here.
func (b *Bind) make(target string) error {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if b.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, b.Source, flags)
	if err != nil {
		if errors.Is(err, unix.ENOSYS) {
			return b.makeOld(target)
		}
		return &os.PathError{Op: "open_tree", Path: b.Source, Err: err}
	}
	defer unix.Close(tree)
	if err := b.attributes(tree); err != nil {
		if errors.Is(err, unix.ENOSYS) {
			return b.makeOld(target)
		}
		return &os.PathError{Op: "mount_setattr", Path: b.Source, Err: err}
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: target, Err: err}
	}
	return nil
}

func (b *Bind) attributes(tree int) error {
	attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if b.Slave {
		attr.Propagation = unix.MS_SLAVE
	}
	if b.RecursiveReadOnly {
		attr.Attr_set = unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return err
	}
	if !b.ReadOnly || b.RecursiveReadOnly {
		return nil
	}
	return unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

// makeOld is for kernels before 5.12. What is mounted on the host later can't
// be kept out: privacy would also hide the mount from the share's server.
func (b *Bind) makeOld(target string) error {
	flags := uintptr(unix.MS_BIND)
	if b.Recursive {
		flags |= unix.MS_REC
	}
	if err := unix.Mount(b.Source, target, "", flags, ""); err != nil {
		return &os.PathError{Op: "bind", Path: b.Source, Err: err}
	}
	if !b.ReadOnly {
		return nil
	}
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return &os.PathError{Op: "remount read-only", Path: target, Err: err}
	}
	return nil
}
