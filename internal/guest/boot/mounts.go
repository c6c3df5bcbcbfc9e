package boot

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

type mount struct {
	fstype, target string
	flags          uintptr
	data           string
	optional       bool // not every kernel has it
}

const plain = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV

// early is what the first steps need, late what containers need.
var (
	early = []mount{
		{fstype: "proc", target: "/proc", flags: plain},
		{fstype: "sysfs", target: "/sys", flags: plain},
		{fstype: "devtmpfs", target: "/dev", flags: unix.MS_NOSUID, data: "mode=0755"},
	}
	late = []mount{
		{fstype: "devpts", target: "/dev/pts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "gid=5,mode=620,ptmxmode=666"},
		{fstype: "tmpfs", target: "/dev/shm", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
		{fstype: "mqueue", target: "/dev/mqueue", flags: plain, optional: true},
		{fstype: "tmpfs", target: "/run", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=0755"},
		{fstype: "tmpfs", target: "/tmp", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
		{fstype: "cgroup2", target: cgroupRoot, flags: plain, data: "nsdelegate,memory_recursiveprot"},
		{fstype: "securityfs", target: "/sys/kernel/security", flags: plain, optional: true},
		{fstype: "bpf", target: "/sys/fs/bpf", flags: plain, data: "mode=0700", optional: true},
	}
)

const cgroupRoot = "/sys/fs/cgroup"

// links are what programs expect in /dev beside the nodes of devtmpfs.
var links = map[string]string{
	"/dev/fd":     "/proc/self/fd",
	"/dev/stdin":  "/proc/self/fd/0",
	"/dev/stdout": "/proc/self/fd/1",
	"/dev/stderr": "/proc/self/fd/2",
}

func mountAll(table []mount) error {
	for _, m := range table {
		if err := m.mount(); err != nil && !m.optional {
			return err
		}
	}
	return nil
}

func (m mount) mount() error {
	err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
	if errors.Is(err, unix.ENOENT) { // directories in /dev are ours to make
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
		err = unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
	}
	if err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
	}
	return nil
}

func makeLinks() error {
	for name, to := range links {
		if err := os.Symlink(to, name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// enableControllers hands every cgroup controller of the kernel down to the
// cgroups of containers.
func enableControllers() error {
	list, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	if err != nil {
		return err
	}
	var enable []string
	for c := range bytes.FieldsSeq(list) {
		enable = append(enable, "+"+string(c))
	}
	return os.WriteFile(cgroupRoot+"/cgroup.subtree_control", []byte(strings.Join(enable, " ")), 0)
}
