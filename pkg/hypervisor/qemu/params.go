package qemu

import "github.com/vmshim/vmshim/pkg/hypervisor"

// readyParam asks for the guest's first sign of life. It is the same for all
// guests: one that goes on from a template has the command line of that.
const readyParam = "vmshim.ready=cid"

// kernelParams is the kernel's command line: what the machine needs, and what
// makes it start fast. Effects were measured as instructions that the guest
// executes up to its first process, which noise does not touch (QEMU's
// -icount; Debian's 6.12 cloud kernel, 256 MiB): 1600 million without any of
// these and with an HPET, 640 with them.
//
// No effect was seen of lpj, noreplace-smp, i8042.*, 8250.nr_uarts, audit=0,
// lsm, init_on_alloc=0 and mitigations=off: they are left alone.
//
// A parameter of the Spec comes last and so wins, where the kernel takes the
// last of two.
func kernelParams(spec hypervisor.Spec, accelerator string) []string {
	var p []string
	switch spec.Arch {
	case "amd64":
		p = append(p, "console=ttyS0")
	case "arm64":
		p = append(p, "console=ttyAMA0")
	}
	p = append(p,
		"quiet",                    // errors only: every byte on a serial port is a trap into QEMU; and a panic is one
		"panic=-1",                 // reboot at once, which -no-reboot makes the machine's end
		"cryptomgr.notests",        // no self-tests of the kernel's ciphers: -890
		"rcupdate.rcu_expedited=1", // few CPUs: namespaces and control groups go without waits for all of them
	)
	if spec.Arch == "amd64" {
		p = append(p,
			"no_timer_check", // QEMU's timers work: -18
			clocksource(accelerator),
			// What a guest has no use for: jitter as a source of entropy beside
			// virtio-rng (-130), congestion control written in BPF (-51), the keys that
			// signed the modules (-29, and checking every module against them). Kernels
			// ignore names they do not have.
			"initcall_blacklist=jent_mod_init,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init,load_system_certificate_list",
			"swiotlb=noforce", // no bounce buffers: 64 MiB, zeroed, when memory may grow beyond 4 GiB: -83
		)
	}
	if hotplugMiB(spec) > 0 {
		// Memory that comes is used at once (Debian's 6.12 does that anyway, its 6.1
		// does not); up to three times of what there is, for what can be moved only,
		// so that it can go again.
		p = append(p, "memhp_default_state=online", "memory_hotplug.online_policy=auto-movable")
	}
	return append(append(p, readyParam), spec.KernelParams...)
}

// clocksource is what the guest tells the time by. Emulated, the TSC is
// calibrated wrongly now and then on a busy host (a clock eight times too fast
// was seen, one boot in twenty), and tsc=reliable would keep it.
func clocksource(accelerator string) string {
	if accelerator == TCG {
		return "clocksource=acpi_pm"
	}
	return "tsc=reliable" // not given up when the host is late
}
