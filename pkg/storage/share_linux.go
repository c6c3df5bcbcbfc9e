package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// MakeShare makes dir, a directory below which mounts propagate to the server
// of the share, and from there to the guest.
func MakeShare(dir string) (err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make share: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, RemoveShare(dir))
		}
	}()
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("make share: bind %s: %w", dir, err)
	}
	// Private first: a shared parent would have put the bind into its own
	// group, and mounts below the share would travel further than to its server.
	for _, flag := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
		if err := unix.Mount("", dir, "", flag, ""); err != nil {
			return fmt.Errorf("make share: propagation of %s: %w", dir, err)
		}
	}
	return nil
}

// RemoveShare removes a share with everything mounted below it. What was
// mounted is not touched. A share that is not there is success.
func RemoveShare(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove share: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, Remove(filepath.Join(dir, e.Name())))
	}
	errs = append(errs, Unmount(dir), removeEntry(dir))
	return errors.Join(errs...)
}

// Remove removes a container's directory below a share: it unmounts what is
// mounted there and removes the names. Nothing that was mounted can be hurt,
// not even if unmounting fails: removal does not descend. A directory that is
// not there is success.
func Remove(dir string) error {
	if err := Unmount(dir); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, removeEntry(filepath.Join(dir, e.Name())))
	}
	return errors.Join(append(errs, removeEntry(dir))...)
}

func removeEntry(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Unmount unmounts everything at dir and below. What a guest has still cached
// is busy: it is detached, and ends when the server of the share lets go.
func Unmount(dir string) error {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real // as the kernel lists it
	}
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("unmount below %s: %w", dir, err)
	}
	var errs []error
	for _, info := range slices.Backward(infos) {
		err := unix.Unmount(info.Mountpoint, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(info.Mountpoint, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		// Gone already, together with its parent or by propagation.
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, &os.PathError{Op: "unmount", Path: info.Mountpoint, Err: err})
		}
	}
	return errors.Join(errs...)
}
