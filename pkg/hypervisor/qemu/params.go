package qemu

import "github.com/vmshim/vmshim/pkg/hypervisor"

// readyParam names the port and the token of the guest's first sign of life.
const readyParam = "vmshim.ready="

// kernelParams is the kernel's command line: what the machine needs, and what
// makes it start fast. Effects were measured with Debian's 6.1 cloud kernel
// under TCG, where it needs 2 s to its first process.
//
// A parameter of the Spec comes last and so wins, where the kernel takes the
// last of two.
func kernelParams(spec hypervisor.Spec, host Host, ready string) []string {
	var p []string
	switch spec.Arch {
	case "amd64":
		p = append(p, "console=ttyS0")
	case "arm64":
		p = append(p, "console=ttyAMA0")
	}
	p = append(p,
		"quiet",              // errors only: every byte on a serial port is a trap into QEMU; and a panic is one
		"panic=-1",           // reboot at once, which -no-reboot makes the machine's end
		"cryptomgr.notests",  // self-tests of the kernel's ciphers: 0.3 s
		"random.trust_cpu=1", // with virtio-rng behind it; nothing waits for entropy
	)
	if spec.Arch == "amd64" {
		p = append(p,
			"no_timer_check", // QEMU's timer works; the check waits for ten ticks
			"tsc=reliable",   // no watchdog over it: a host that is late would lose the guest its clock
			"i8042.noaux",    // nobody types or points: each probe of a port waits for an answer
			"i8042.nomux", "i8042.nopnp", "i8042.dumbkbd",
		)
	}
	if host.Accelerator == TCG {
		p = append(p, "mitigations=off") // there is no speculation to guard against
	}
	if ready != "" {
		p = append(p, readyParam+ready)
	}
	return append(p, spec.KernelParams...)
}
