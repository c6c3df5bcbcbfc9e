package guest

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// How the host says which device it means. Only text here: what is there is
// devices' to find.

// A pciPath leads from the root bus down: the slot of a device on each bus, all
// but the last of them bridges. It is written "02/05".
type pciPath []pciFunction

type pciFunction struct{ slot, function uint8 }

// maxPCIDepth is far more bridges behind bridges than a machine has.
const maxPCIDepth = 16

func parsePCIPath(s string) (pciPath, error) {
	parts := strings.Split(s, "/")
	if len(parts) > maxPCIDepth {
		return nil, invalid("PCI path %q has %d parts", bound(s, 64), len(parts))
	}
	path := make(pciPath, len(parts))
	for i, part := range parts {
		slot, function, ok := strings.Cut(part, ".")
		if !ok {
			function = "0"
		}
		n, err := strconv.ParseUint(slot, 16, 8)
		f, ferr := strconv.ParseUint(function, 8, 3)
		if len(slot) != 2 || len(function) != 1 || err != nil || ferr != nil || n > 0x1f {
			return nil, invalid("PCI path %q", bound(s, 64))
		}
		path[i] = pciFunction{uint8(n), uint8(f)}
	}
	return path, nil
}

// slotsPath is a PCI path as a list of numbers.
func slotsPath(slots []uint32) (pciPath, error) {
	if len(slots) == 0 || len(slots) > maxPCIDepth {
		return nil, invalid("PCI path of %d parts", len(slots))
	}
	path := make(pciPath, len(slots))
	for i, n := range slots {
		if n > 0x1f {
			return nil, invalid("PCI path with slot %#x", n)
		}
		path[i] = pciFunction{slot: uint8(n)}
	}
	return path, nil
}

func (p pciPath) String() string {
	parts := make([]string, len(p))
	for i, f := range p {
		parts[i] = fmt.Sprintf("%02x", f.slot)
		if f.function > 0 {
			parts[i] += fmt.Sprintf(".%d", f.function)
		}
	}
	return strings.Join(parts, "/")
}

// on is the name of the function on a bus ("0000:00"), as sysfs has it.
func (f pciFunction) on(bus string) string { return fmt.Sprintf("%s:%02x.%d", bus, f.slot, f.function) }

// A scsiAddress is written "ID:LUN"; the channel is always 0.
type scsiAddress struct{ id, lun uint16 }

func parseSCSI(s string) (scsiAddress, error) {
	id, lun, _ := strings.Cut(s, ":")
	i, err := strconv.ParseUint(id, 10, 8)
	l, lerr := strconv.ParseUint(lun, 10, 14) // as far as QEMU and Linux agree
	if err != nil || lerr != nil {
		return scsiAddress{}, invalid("SCSI address %q", bound(s, 64))
	}
	return scsiAddress{uint16(i), uint16(l)}, nil
}

func (a scsiAddress) String() string { return fmt.Sprintf("%d:%d", a.id, a.lun) }

// pciAddress is the name of a PCI function in sysfs.
var pciAddress = regexp.MustCompile(`\b[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]\b`)

// parseVFIO reads an option "HOST-ADDRESS=PCI-PATH".
func parseVFIO(s string) (host string, path pciPath, err error) {
	host, guest, ok := strings.Cut(s, "=")
	if !ok || pciAddress.FindString(host) != host || host == "" {
		return "", nil, invalid("PCI device %q", bound(s, 128))
	}
	path, err = parsePCIPath(guest)
	return strings.ToLower(host), path, err
}

// guestAddresses puts the guest's addresses where an environment variable of a
// Kubernetes device plugin (PCIDEVICE_…) has the host's.
func guestAddresses(env []string, addresses map[string]string) []string {
	if len(addresses) == 0 {
		return env
	}
	out := make([]string, len(env))
	for i, e := range env {
		if strings.HasPrefix(e, "PCIDEVICE_") {
			e = pciAddress.ReplaceAllStringFunc(e, func(host string) string {
				if guest, ok := addresses[strings.ToLower(host)]; ok {
					return guest
				}
				return host
			})
		}
		out[i] = e
	}
	return out
}
