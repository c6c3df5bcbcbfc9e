package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// drainTimeout bounds the wait for the output of a command that has ended.
const drainTimeout = 2 * time.Second

// Directories of the initramfs.
const (
	lowers = "/lower" // where shares are mounted
	layers = "/layer" // a file system in memory, with what is written
	root   = "/root"  // the new root, until it is that
)

// memory are the directories that are empty, and in memory: containerd's
// overlays can't be on an overlay.
var memory = map[string]string{
	"/tmp":     "mode=1777",
	"/run":     "mode=0755",
	"/var/lib": "mode=0755",
	"/var/tmp": "mode=1777",
}

// makeRoot makes the shares the root of this process and moves there. The first
// process stays where it is: the kernel finds its modules there.
func makeRoot(mounts []mounted) error {
	if err := mount("tmpfs", layers, "tmpfs", 0, "mode=0755,size=90%"); err != nil {
		return err
	}
	for i, m := range mounts {
		if err := overlay(m.Tag, filepath.Join(root, m.Path)); err != nil {
			return err
		}
		if i == 0 {
			if err := mountSystem(); err != nil {
				return err
			}
		}
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	// As systemd has it, and shims expect it: what is mounted propagates.
	if err := unix.Mount("", root, "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return devices()
}

// overlay mounts a share with a layer above it that takes what is written.
func overlay(tag, at string) error {
	lower, upper, work := filepath.Join(lowers, tag), filepath.Join(layers, tag, "upper"), filepath.Join(layers, tag, "work")
	for _, dir := range []string{upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := mount(tag, lower, "virtiofs", unix.MS_RDONLY, ""); err != nil {
		return err
	}
	return mount("overlay", at, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work))
}

// mountSystem puts what the first process has mounted, and what is to be empty,
// into the new root.
func mountSystem() error {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := mount(dir, root+dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	for dir, data := range memory {
		if err := mount("tmpfs", root+dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
			return err
		}
	}
	return nil
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

// devices gives the devices of virtualization the group and the mode that
// Debian's udev rules give them (50-udev-default.rules).
func devices() error {
	gid, err := group("kvm")
	if err != nil {
		return err
	}
	mode := os.FileMode(0o660)
	if gid == 0 {
		mode = 0o666 // no such group, as in a small system
	}
	for _, path := range []string{"/dev/kvm", "/dev/vhost-net", "/dev/vhost-vsock"} {
		if err := os.Chown(path, 0, gid); err != nil {
			return err
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
	}
	return nil
}

// group is the number of a group of the root file system; 0: there is none.
func group(name string) (int, error) {
	f, err := os.Open("/etc/group")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Split(lines.Text(), ":"); len(fields) > 2 && fields[0] == name {
			return strconv.Atoi(fields[2])
		}
	}
	return 0, lines.Err()
}

// groupDir is the control group of the command: that of a service of systemd's,
// with all controllers handed down.
const groupDir = "/sys/fs/cgroup/system.slice/kvmhost.service"

func makeGroup() (*os.File, error) {
	const top = "/sys/fs/cgroup"
	if err := os.MkdirAll(groupDir, 0o755); err != nil {
		return nil, err
	}
	controllers, err := os.ReadFile(filepath.Join(top, "cgroup.controllers"))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, dir := range []string{top, filepath.Dir(groupDir)} {
		for name := range strings.FieldsSeq(string(controllers)) {
			errs = append(errs, os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0))
		}
	}
	dir, err := os.Open(groupDir)
	return dir, errors.Join(append(errs, err)...)
}
