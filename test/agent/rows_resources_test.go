package agent_test

import (
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

var resourceRows = []row{
	{24, "OnlineCPUMem", "OnlineCPUMem", "processors and MemTotal in the guest, after a hot add with auto-online off (a kernel without a place for processors: on the tuned kernel too, where make kernel built it, else one that was set offline)", proveOnlineCPUMem, with[noOnlineCPUMem]},
	{25, "MemHotplugByProbe", "MemHotplugByProbe", "booted with acpi_no_memhotplug, module plugged: blocks in sysfs, then MemTotal; a kernel without a probe file: an honest error, then the tuned kernel where it was built", proveMemHotplugByProbe, with[noMemHotplugByProbe]},
	{39, "AddSwap", "AddSwap", "/proc/swaps", proveAddSwap, with[noAddSwap]},
	{55, "AddSwapPath", "AddSwapPath", "/proc/swaps", proveAddSwapPath, with[noAddSwapPath]},
}

const memory = "/sys/devices/system/memory"

// A figure of the guest as it counts itself.
const (
	processors = "grep -c ^processor /proc/cpuinfo"
	memTotal   = "awk '/^MemTotal/{print int($2/1024)}' /proc/meminfo"
)

func proveOnlineCPUMem(e *env) {
	if onlines(e) == 1 {
		return
	}
	// A recent Linux has no place for another processor where it does not know the
	// hypervisor, which is QEMU's own emulation. The tuned one has; else there is
	// one that can be set offline.
	if !e.bootTuned() {
		e.boot(startGuest, func(s *hypervisor.Spec) { s.VCPUs = 2 })
	}
	e.equal("processors that came", onlines(e), 1)
}

// onlines proves OnlineCPUMem by memory, and by a processor that is plugged or
// was set offline before, if there can be one.
func onlines(e *env) (more int) {
	g := e.guest
	was := e.look("cat " + memory + "/auto_online_blocks")
	e.undo.Add(e.guestDo("echo " + was + " > " + memory + "/auto_online_blocks"))
	e.look("echo offline > " + memory + "/auto_online_blocks")
	const dir = "/sys/devices/system/cpu/"
	place := e.look("cat "+dir+"possible") != e.look("cat "+dir+"present")
	if !place && e.look("test -e "+dir+"cpu1 && echo yes; true") == "yes" {
		e.look("echo 0 > " + dir + "cpu1/online")
		more = 1
	}
	cpus, mibs := e.number(processors), e.number(memTotal)
	if place {
		more = 1
		g.cpus++ // and it stays: older QEMUs can't remove one
		_, err := g.ResizeCPUs(e.ctx, g.cpus)
		e.ok(err)
	}
	e.undo.Add(func() error {
		ctx, cancel := e.later()
		defer cancel()
		_, err := g.ResizeMemory(ctx, guestMiB)
		return err
	})
	_, err := g.ResizeMemory(e.ctx, guestMiB+128)
	e.ok(err)
	e.equal("before the call", []int64{e.number(processors), e.number(memTotal)}, []int64{cpus, mibs})

	e.ok(e.OnlineCPUMem(e.ctx, uint32(more), false))
	e.equal("processors", e.number(processors), cpus+int64(more))
	if now := e.number(memTotal); now < mibs+120 {
		e.fail("%d MiB of memory after %d and a module of 128", now, mibs)
	}
	return more
}

func proveMemHotplugByProbe(e *env) {
	change := func(s *hypervisor.Spec) {
		s.MaxMemoryMiB, s.MemorySlots = guestMiB+128, 1
		s.KernelParams = append(s.KernelParams, "acpi_no_memhotplug")
	}
	if e.look("test -e "+memory+"/probe && echo yes; true") == "yes" {
		e.boot(startGuest, change)
	} else {
		e.is("a kernel that does not probe", e.MemHotplugByProbe(e.ctx, []uint64{1 << 32}), errdefs.ErrFailedPrecondition)
		if !e.bootTuned(change) {
			return
		}
	}
	const blocks = "ls -d " + memory + "/memory[0-9]* | wc -l"
	known, mibs := e.number(blocks), e.number(memTotal)
	m, err := e.guest.ResizeMemory(e.ctx, guestMiB+128)
	e.ok(err)
	e.equal("modules", len(m.Modules), 1)
	e.look("usleep 300000") // what would come by ACPI
	e.equal("blocks before the call", e.number(blocks), known)
	size, err := strconv.ParseUint(e.look("cat "+memory+"/block_size_bytes"), 16, 64)
	e.ok(err)
	var addrs []uint64
	for at := uint64(0); at < 128*mib; at += size {
		addrs = append(addrs, m.Modules[0].Address+at)
	}
	e.ok(e.MemHotplugByProbe(e.ctx, addrs))
	e.equal("blocks", e.number(blocks), known+int64(len(addrs)))
	e.ok(e.OnlineCPUMem(e.ctx, 0, false))
	if now := e.number(memTotal); now < mibs+120 {
		e.fail("%d MiB of memory after %d and a module of 128", now, mibs)
	}
}

// swapDisk plugs a disk with the mark of swap.
func swapDisk(e *env) (d hypervisor.Disk, pciPath string) {
	d = e.image(16, "/bin/busybox", "mkswap")
	return d, e.plug(d)
}

const swaps = "awk 'NR>1{print $1, $3}' /proc/swaps"

// swapped waits for the swap and takes it away in the end.
func swapped(e *env, d hypervisor.Disk) {
	device := "/dev/" + e.device(d)
	e.undo.Add(e.guestDo("swapoff " + device + " 2>/dev/null; true"))
	e.equal("swaps", e.look(swaps), device+" 16380")
}

func proveAddSwap(e *env) {
	d, path := swapDisk(e)
	e.ok(e.AddSwap(e.ctx, slots(path)))
	swapped(e, d)
}

func proveAddSwapPath(e *env) {
	d, _ := swapDisk(e)
	e.ok(e.AddSwapPath(e.ctx, "/dev/"+e.device(d)))
	swapped(e, d)
}
