package hypervisor

import (
	"errors"
	"fmt"
	"net"
	"strings"
)

// What can be added to a running machine, besides a Disk and a Share.

// A NIC is a virtio network card.
type NIC struct {
	ID  string // unique among the machine's cards
	MAC string // of the guest's side
	MTU int    // told to the guest; 0: not told
}

// Validate reports every fault of the description at once.
func (n NIC) Validate() error {
	var errs []error
	if n.ID == "" {
		errs = append(errs, errors.New("id is empty"))
	}
	if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 || mac.String() != strings.ToLower(n.MAC) {
		errs = append(errs, fmt.Errorf("%q is not the address of one Ethernet card", n.MAC))
	}
	if n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535) { // RFC 791; virtio 1.2, 5.1.4
		errs = append(errs, fmt.Errorf("mtu %d is not 68 to 65535", n.MTU))
	}
	return errors.Join(errs...)
}

// A PCIDevice is any device that the hypervisor knows by name.
type PCIDevice struct {
	ID         string // unique among these devices
	Driver     string
	Properties map[string]any // in the hypervisor's words
}

// A Kind is what a plugged device is.
type Kind string

// The kinds.
const (
	KindDisk           Kind = "disk"
	KindSCSIDisk       Kind = "scsi-disk"
	KindSCSIController Kind = "scsi" // comes with the first SCSI disk, and stays
	KindNIC            Kind = "nic"
	KindShare          Kind = "share"
	KindVsock          Kind = "vsock" // of a machine that began with a template
	KindPCI            Kind = "pci"
	KindCPU            Kind = "cpu"
	KindMemory         Kind = "memory" // a module; not what virtio-mem gives
)

// A Plugged is a device that was added to a running machine: all that is needed
// to remove it.
type Plugged struct {
	Kind Kind   `json:"kind"`
	ID   string `json:"id"` // the owner's: tag of a share
	// Slot is where it is: on the hotplug bus, the target of a SCSI disk, the
	// number of a memory module or CPU.
	Slot int    `json:"slot"`
	Path string `json:"path,omitempty"` // image of a disk
	MiB  int    `json:"mib,omitempty"`  // size of a memory module
}

// Memory is how much of it a machine has.
type Memory struct {
	MiB     int            // in all
	Modules []MemoryModule // that were plugged
}

// A MemoryModule is plugged memory that the guest finds at an address.
type MemoryModule struct {
	Address uint64
	MiB     int
}
