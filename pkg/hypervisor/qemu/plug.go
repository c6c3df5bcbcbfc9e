package qemu

// Hotplug of disks, network cards, shares, CPUs and memory belongs here: typed
// methods of VM over vm.qmp. What it can build on was decided at boot (args.go)
// and can't be changed later:
//
//   - the bus "hotplug" takes 31 devices, addresses 1 to 31, always given
//     explicitly; its ACPI hotplug is seen by the guest within 30 ms;
//   - descriptors come by qmp.Client.GetFD or add-fd: QEMU may open nothing;
//   - memory grows by qom-set requested-size of "hotmem0", in steps of
//     memoryBlockMiB; read size for what the guest made of it;
//   - CPUs go up to maxcpus (query-hotpluggable-cpus); QEMU 7.2 is corrupted by
//     removing one: it is set offline in the guest instead.
