package qemu

import (
	"fmt"
	"strings"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// descriptors are the numbers that the files handed to QEMU have there.
type descriptors struct {
	QMP, Console   int
	Kernel, Initrd int
	Vsock          int   // /dev/vhost-vsock, or the connection to vhost-device-vsock; 0: it comes later
	Memory         int   // the guest's memory; 0: QEMU makes it
	Shares         []int // in the order of the Spec, as are Disks
	Disks          []diskDescriptor
}

type diskDescriptor struct {
	FD    int
	Block bool // a block device, not an image file
}

// slots of the root bus, written down because a snapshot needs them again. The
// root bus takes no hotplug: what comes later sits behind the bridge.
const (
	bridgeSlot = 0x2
	rngSlot    = 0x3
	vsockSlot  = 0x4
	memorySlot = 0x5
	shareSlot  = 0x8 // to 0xf
	diskSlot   = 0x10
	lastSlot   = 0x1e // 0x1f is the ISA bridge of q35

	maxShares = diskSlot - shareSlot
	maxDisks  = lastSlot - diskSlot + 1
)

// bridge is the id of the bus that takes up to 31 devices by hotplug.
const bridge = "hotplug"

// arguments is QEMU's command line without its name. It is a function of its
// parameters alone; the golden files in testdata show what it makes.
func arguments(spec hypervisor.Spec, cfg Config, host Host, cid uint32, fd descriptors) []string {
	a := argv{}
	a.add("-name", "guest="+escape(spec.Name)+",debug-threads=on")
	a.add("-nodefaults")
	a.add("-no-user-config")
	a.add("-display", "none")
	a.add("-no-reboot") // a guest that panics reboots: the machine is to end
	a.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	a.add("-machine", machine(spec, host))
	a.add("-accel", host.Accelerator)
	a.add("-cpu", cpu(cfg, host))
	a.add("-smp", fmt.Sprintf("cpus=%d,sockets=1,cores=%d,threads=1,maxcpus=%d", spec.VCPUs, spec.MaxVCPUs, spec.MaxVCPUs))
	a.memory(spec, fd.Memory)
	a.add("-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", fd.QMP))
	a.add("-mon", "chardev=qmp,mode=control")
	a.add("-chardev", fmt.Sprintf("socket,id=console,fd=%d", fd.Console))
	a.add("-serial", "chardev:console") // isa-serial on q35, pl011 on virt
	a.device("pcie-pci-bridge", bridge, bridgeSlot)
	a.add("-object", "rng-builtin,id=entropy")
	a.device("virtio-rng-pci", "rng0", rngSlot, "rng=entropy")
	if fd.Vsock != 0 {
		a.vsock(host, cid, fd.Vsock)
	}
	for i, share := range spec.Shares {
		a.share(i, share, fd.Shares[i])
	}
	for i, disk := range spec.Disks {
		a.disk(i, disk, fd.Disks[i])
	}
	// By number, because the directories above a file may be closed to QEMU's
	// user while the file is not.
	a.add("-kernel", fdPath(fd.Kernel))
	a.add("-initrd", fdPath(fd.Initrd))
	a.add("-append", strings.Join(kernelParams(spec, host.Accelerator), " "))
	return a
}

// machine leaves out what a guest without a screen and old disks never looks
// for, and the HPET, against which it would calibrate its clocks for long.
func machine(spec hypervisor.Spec, host Host) string {
	options := []string{host.Machine, "memory-backend=mem", "dump-guest-core=off", "mem-merge=off", "usb=off"}
	switch spec.Arch {
	case "amd64":
		options = append(options, "hpet=off", "smm=off", "vmport=off", "smbus=off", "sata=off")
	case "arm64":
		options = append(options, "gic-version=max")
	}
	return strings.Join(options, ",")
}

func cpu(cfg Config, host Host) string {
	if cfg.CPU != "" {
		return cfg.CPU
	}
	switch {
	case host.Accelerator == KVM:
		return "host"
	case host.Arch == "arm64":
		return "max,pauth-impdef=on" // the architected algorithm is slow to emulate
	}
	return "max,erms=off,fsrm=off" // "rep movsb" goes byte by byte: kernels are to copy words
}

type argv []string

func (a *argv) add(args ...string) { *a = append(*a, args...) }

// device adds a device on the root bus.
func (a *argv) device(driver, id string, slot int, properties ...string) {
	s := fmt.Sprintf("%s,id=%s,bus=%s,addr=0x%x", driver, id, "pcie.0", slot)
	a.add("-device", strings.Join(append([]string{s}, properties...), ","))
}

// memory is shared, because the back ends of vhost-user devices map it too.
// What can be added sits in one virtio-mem device that starts empty, or comes as
// modules. Memory that is handed over is a file to QEMU, which then leaves it
// alone when it reads or writes the machine's state.
func (a *argv) memory(spec hypervisor.Spec, fd int) {
	backend := func(id string, mib int, more string) {
		kind := "memory-backend-memfd"
		if id == "mem" && fd != 0 {
			kind, more = "memory-backend-file", ",mem-path="+fdPath(fd)+more
		}
		a.add("-object", fmt.Sprintf("%s,id=%s,size=%dM,share=on%s", kind, id, mib, more))
	}
	hotplug := hotplugMiB(spec)
	if hotplug == 0 {
		a.add("-m", fmt.Sprintf("size=%dM", spec.MemoryMiB))
		backend("mem", spec.MemoryMiB, "")
		return
	}
	if spec.MemorySlots > 0 {
		a.add("-m", fmt.Sprintf("size=%dM,slots=%d,maxmem=%dM", spec.MemoryMiB, spec.MemorySlots, spec.MemoryMiB+hotplug))
		backend("mem", spec.MemoryMiB, "")
		return
	}
	a.add("-m", fmt.Sprintf("size=%dM,maxmem=%dM", spec.MemoryMiB, spec.MemoryMiB+hotplug))
	backend("mem", spec.MemoryMiB, "")
	backend("hotmem", hotplug, ",reserve=off")
	a.device("virtio-mem-pci", virtioMem, memorySlot, "memdev=hotmem", "requested-size=0")
}

// virtioMem is the id of the device.
const virtioMem = "hotmem0"

// hotplugMiB is what memory can grow by.
func hotplugMiB(spec hypervisor.Spec) int {
	block := memoryBlockMiB
	if spec.MemorySlots > 0 {
		block = moduleMiB
	}
	return (spec.MaxMemoryMiB - spec.MemoryMiB) / block * block
}

// memoryBlockMiB is what the size of a virtio-mem device must be a multiple of:
// a transparent huge page of x86 (512 MiB with the largest pages of arm64 is
// not supported).
const memoryBlockMiB = 2

func (a *argv) vsock(host Host, cid uint32, fd int) {
	if host.Vsock == VsockKernel {
		a.device("vhost-vsock-pci", "vsock0", vsockSlot, fmt.Sprintf("vhostfd=%d", fd), fmt.Sprintf("guest-cid=%d", cid))
		return
	}
	a.add("-chardev", fmt.Sprintf("socket,id=vsock,fd=%d", fd))
	a.device("vhost-user-vsock-pci", "vsock0", vsockSlot, "chardev=vsock")
}

func (a *argv) share(i int, share hypervisor.Share, fd int) {
	id := fmt.Sprintf("fs%d", i)
	a.add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", id, fd))
	a.device("vhost-user-fs-pci", "share"+id, shareSlot+i, "chardev="+id, "tag="+escape(share.Tag), "queue-size=1024")
}

// disk refers to a descriptor set, so that QEMU's user needs no right to the
// file, and takes no lock: who may use it is the owner's business. The guest
// finds the disk by its serial number.
func (a *argv) disk(i int, disk hypervisor.Disk, fd diskDescriptor) {
	set, node := i+1, bootNode(i)
	a.add("-add-fd", fmt.Sprintf("fd=%d,set=%d", fd.FD, set))
	driver := "file"
	if fd.Block {
		driver = "host_device"
	}
	access := "read-only=off,discard=unmap"
	if disk.ReadOnly {
		access = "read-only=on"
	}
	a.add("-blockdev", fmt.Sprintf("driver=%s,node-name=%s,filename=/dev/fdset/%d,locking=off,%s", driver, node, set, access))
	a.device("virtio-blk-pci", "blk"+node, diskSlot+i, "drive="+node, "serial="+escape(disk.ID))
}

// bootNode is the block node of a disk that is there at boot.
func bootNode(i int) string { return fmt.Sprintf("disk%d", i) }

// escape makes an outside string one value of an option (qemu(1), "-name").
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
