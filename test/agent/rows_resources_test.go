package agent_test

import (
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

var resourceRows = []row{
	{24, "OnlineCPUMem", "OnlineCPUMem", "processors and MemTotal in the guest, after a hot add with auto-online off", proveOnlineCPUMem, with[noOnlineCPUMem]},
	{25, "MemHotplugByProbe", "MemHotplugByProbe", "booted with acpi_no_memhotplug, module plugged: blocks in sysfs, then MemTotal; a kernel without a probe file: an honest error", proveMemHotplugByProbe, with[noMemHotplugByProbe]},
	{39, "AddSwap", "AddSwap", "/proc/swaps", proveAddSwap, with[noAddSwap]},
	{55, "AddSwapPath", "AddSwapPath", "/proc/swaps", proveAddSwapPath, with[noAddSwapPath]},
}

func proveOnlineCPUMem(e *env)      { e.fail("not written yet") }
func proveMemHotplugByProbe(e *env) { e.fail("not written yet") }

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
