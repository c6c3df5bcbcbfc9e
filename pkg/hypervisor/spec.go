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
	// MemorySlots is how many memory modules (DIMMs) can be plugged; 0: memory
	// grows by virtio-mem, which guests without its driver have not.
	MemorySlots int

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

// A Disk is what the guest sees as a block device; at boot, on virtio-blk.
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
	if s.MemorySlots < 0 || s.MemorySlots > 256 { // ACPI_MAX_RAM_SLOTS of QEMU
		bad("%d memory slots are not 0 to 256", s.MemorySlots)
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
		if tags[sh.Tag] {
			bad("share tag %q is taken", sh.Tag)
		}
		tags[sh.Tag] = true
		errs = append(errs, sh.Validate())
	}
	ids := map[string]bool{}
	for _, d := range s.Disks {
		if ids[d.ID] {
			bad("disk id %q is taken", d.ID)
		}
		ids[d.ID] = true
		errs = append(errs, d.Validate())
	}
	return errors.Join(errs...)
}

// Validate reports every fault of the description at once.
func (s Share) Validate() error {
	var errs []error
	if s.Tag == "" || len(s.Tag) > 35 { // struct virtio_fs_config has char tag[36]
		errs = append(errs, fmt.Errorf("share tag %q is empty or long", s.Tag))
	}
	if !filepath.IsAbs(s.Dir) {
		errs = append(errs, fmt.Errorf("share %q: directory %q is not absolute", s.Tag, s.Dir))
	}
	return errors.Join(errs...)
}

// Validate reports every fault of the description at once.
func (d Disk) Validate() error {
	var errs []error
	if d.ID == "" || len(d.ID) > 20 { // VIRTIO_BLK_ID_BYTES
		errs = append(errs, fmt.Errorf("disk id %q is empty or long", d.ID))
	}
	if strings.Trim(d.ID, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		errs = append(errs, fmt.Errorf("disk id %q has more than a-z, 0-9 and -", d.ID))
	}
	if !filepath.IsAbs(d.Path) {
		errs = append(errs, fmt.Errorf("disk %q: path %q is not absolute", d.ID, d.Path))
	}
	return errors.Join(errs...)
}
