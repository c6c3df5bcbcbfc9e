// Package hypervisor says what a machine is, as plain data. It starts nothing
// and reads nothing of the host: pkg/hypervisor/qemu makes a running machine
// of a Spec.
package hypervisor

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// A Spec describes a machine. The zero value of a field without a comment on
// zero is invalid.
type Spec struct {
	// Name is the sandbox's id, for process names and log lines.
	Name string
	// Arch is the guest's architecture in Go's spelling: "amd64" or "arm64".
	Arch string

	VCPUs    int
	MaxVCPUs int // what CPUs can grow to by hotplug; at least VCPUs

	MemoryMiB    int
	MaxMemoryMiB int // what memory can grow to by hotplug; at least MemoryMiB

	Kernel       string   // path of the kernel: vmlinux (PVH) or bzImage; Image on arm64
	Initrd       string   // path of the initramfs
	KernelParams []string // appended to what the machine itself needs

	Shares []Share // directories of the host that the guest may mount
	Disks  []Disk  // disks present at boot
}

// A Share is a directory that the guest mounts by its tag (virtio-fs).
type Share struct {
	Tag string
	Dir string // absolute
}

// A Disk is a virtio-blk disk.
type Disk struct {
	ID       string // unique in the machine, [a-z0-9-], at most 20 bytes
	Path     string // absolute: an image file (raw) or a block device
	ReadOnly bool
}

// A Process is one of the host processes that make up a machine.
type Process struct {
	Role string `json:"role"` // "qemu", "virtiofsd", "vhost-device-vsock"
	PID  int    `json:"pid"`
	// StartTime is field 22 of /proc/PID/stat (clock ticks since boot). With
	// the pid it names a process for good: pids are used again.
	StartTime uint64 `json:"start_time"`
}

// Validate reports every fault of the description at once.
func (s Spec) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.Name == "" {
		bad("name is empty")
	}
	if s.Arch != "amd64" && s.Arch != "arm64" {
		bad("architecture %q is not amd64 or arm64", s.Arch)
	}
	if s.VCPUs < 1 || s.MaxVCPUs < s.VCPUs {
		bad("%d vCPUs of at most %d", s.VCPUs, s.MaxVCPUs)
	}
	if s.MemoryMiB < 64 || s.MaxMemoryMiB < s.MemoryMiB {
		bad("%d MiB of memory (at least 64) of at most %d", s.MemoryMiB, s.MaxMemoryMiB)
	}
	if !filepath.IsAbs(s.Kernel) {
		bad("kernel %q is not an absolute path", s.Kernel)
	}
	if !filepath.IsAbs(s.Initrd) {
		bad("initrd %q is not an absolute path", s.Initrd)
	}
	for _, param := range s.KernelParams {
		if param == "" || strings.ContainsAny(param, "\n\x00") {
			bad("kernel parameter %q", param)
		}
	}
	tags := map[string]bool{}
	for _, sh := range s.Shares {
		if sh.Tag == "" || len(sh.Tag) > 35 || tags[sh.Tag] { // struct virtio_fs_config has char tag[36]
			bad("share tag %q is empty, long or taken", sh.Tag)
		}
		tags[sh.Tag] = true
		if !filepath.IsAbs(sh.Dir) {
			bad("share %q: directory %q is not absolute", sh.Tag, sh.Dir)
		}
	}
	ids := map[string]bool{}
	for _, d := range s.Disks {
		if d.ID == "" || len(d.ID) > 20 || ids[d.ID] { // VIRTIO_BLK_ID_BYTES
			bad("disk id %q is empty, long or taken", d.ID)
		}
		if strings.Trim(d.ID, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			bad("disk id %q has more than a-z, 0-9 and -", d.ID)
		}
		ids[d.ID] = true
		if !filepath.IsAbs(d.Path) {
			bad("disk %q: path %q is not absolute", d.ID, d.Path)
		}
	}
	return errors.Join(errs...)
}
