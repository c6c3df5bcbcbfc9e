package boot

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// switchRoot makes the initramfs a root that can be pivoted away from. The
// kernel unpacks it into rootfs, the mount at the bottom of the tree, which
// pivot_root(2) refuses; a bind mount of the same files moved on top of it is
// an ordinary mount, and nothing has to be copied.
func switchRoot() error {
	const bind = "/newroot"
	if err := os.Mkdir(bind, 0o755); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount("/", bind, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("switch root: bind: %w", err)
	}
	if err := unix.Chdir(bind); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: move: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("switch root: chroot: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	return os.Remove(bind)
}
