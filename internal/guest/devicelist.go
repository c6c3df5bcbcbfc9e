package guest

import (
	"context"
	"maps"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// The devices of a container: the host names them, and the specification has
// them with the numbers and addresses they have there.

// A deviceChange is what the specification must say of a device instead.
type deviceChange struct {
	node
	containerPath string            // "": it has no node
	newPath       string            // of the node in the container, if another one
	addresses     map[string]string // PCI: the host's to the guest's
}

// A deviceHandler waits for a device; undo, if there is one, lets it go.
type deviceHandler func(ctx context.Context, b *sandbox, dev *protocol.Device) (c deviceChange, undo func() error, err error)

// deviceHandlers are the kinds of devices of this agent; GetGuestDetails
// announces them.
var deviceHandlers = map[string]deviceHandler{
	"blk":         blockDevice,
	"mmioblk":     pathDevice,
	"nvdimm":      pathDevice,
	"scsi":        scsiDevice,
	"vfio-pci":    vfioDevice,
	"vfio-pci-gk": guestDevice,
}

// addDevices waits for the devices of a container and changes what its
// specification says of them. What undo gets lets them go again.
func (b *sandbox) addDevices(ctx context.Context, spec *specs.Spec, list []*protocol.Device, undo *cleanup.Stack) error {
	var changes []deviceChange
	for _, dev := range list {
		handle := deviceHandlers[dev.GetType()]
		if handle == nil {
			return notImplemented("device of type " + bound(dev.GetType(), 64))
		}
		change, release, err := handle(ctx, b, dev)
		if release != nil {
			undo.Add(release)
		}
		if err != nil {
			return err
		}
		changes = append(changes, change)
	}
	return applyDevices(spec, changes)
}

func blockDevice(ctx context.Context, b *sandbox, dev *protocol.Device) (deviceChange, func() error, error) {
	source := dev.GetId()
	if source == "" {
		source = dev.GetVmPath()
	}
	n, err := b.devices.anyDisk(ctx, source)
	return deviceChange{node: n, containerPath: dev.GetContainerPath()}, nil, err
}

func pathDevice(ctx context.Context, b *sandbox, dev *protocol.Device) (deviceChange, func() error, error) {
	n, err := b.devices.disk(ctx, dev.GetVmPath())
	return deviceChange{node: n, containerPath: dev.GetContainerPath()}, nil, err
}

func scsiDevice(ctx context.Context, b *sandbox, dev *protocol.Device) (deviceChange, func() error, error) {
	address, err := parseSCSI(dev.GetId())
	if err != nil {
		return deviceChange{}, nil, err
	}
	n, err := b.devices.scsiDisk(ctx, address)
	return deviceChange{node: n, containerPath: dev.GetContainerPath()}, nil, err
}

// guestDevice is a PCI device that a driver of the guest's kernel drives.
func guestDevice(ctx context.Context, b *sandbox, dev *protocol.Device) (deviceChange, func() error, error) {
	change, _, err := pciFunctions(ctx, b, dev)
	return change, nil, err
}

// vfioDevice is a PCI device that a process of the container drives.
func vfioDevice(ctx context.Context, b *sandbox, dev *protocol.Device) (deviceChange, func() error, error) {
	change, dirs, err := pciFunctions(ctx, b, dev)
	if err != nil {
		return change, nil, err
	}
	if err := b.cfg.loadDriver(ctx, "vfio-pci"); err != nil {
		return change, nil, err
	}
	var undo cleanup.Stack
	for i, dir := range dirs {
		n, release, err := b.devices.bindVFIO(ctx, dir)
		if err != nil {
			return change, undo.Run, err
		}
		undo.Add(release)
		if i > 0 && n != change.node {
			return change, undo.Run, invalid("the functions of device %q are in different groups", dev.GetId())
		}
		change.node = n
	}
	// A driver looks for its group by the number that sysfs has.
	change.containerPath, change.newPath = dev.GetContainerPath(), change.path
	return change, undo.Run, nil
}

// pciFunctions waits for all functions of a device and returns their directories
// in sysfs.
func pciFunctions(ctx context.Context, b *sandbox, dev *protocol.Device) (change deviceChange, dirs []string, err error) {
	if len(dev.GetOptions()) == 0 {
		return change, nil, invalid("device %q has no PCI path", dev.GetId())
	}
	change.addresses = map[string]string{}
	for _, option := range dev.GetOptions() {
		host, path, err := parseVFIO(option)
		if err != nil {
			return change, nil, err
		}
		dir, err := b.devices.pciDevice(ctx, path)
		if err != nil {
			return change, nil, err
		}
		change.addresses[host] = filepath.Base(dir)
		dirs = append(dirs, dir)
	}
	return change, dirs, nil
}

// applyDevices changes the specification: the nodes, the rules of the control
// group, and the environment that device plugins made.
func applyDevices(spec *specs.Spec, changes []deviceChange) error {
	renumbered := map[deviceNumber]node{}
	addresses := map[string]string{}
	for _, c := range changes {
		maps.Copy(addresses, c.addresses)
		if c.containerPath == "" {
			continue
		}
		i := slices.IndexFunc(spec.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == c.containerPath })
		if i < 0 {
			return invalid("the specification has no device %q", bound(c.containerPath, 512))
		}
		d := &spec.Linux.Devices[i]
		renumbered[numberOf(d.Type, d.Major, d.Minor)] = c.node
		d.Type, d.Major, d.Minor = c.kind, c.major, c.minor
		if c.newPath != "" {
			d.Path = c.newPath
		}
	}
	rules := spec.Linux.Resources.Devices
	for i, r := range rules {
		if r.Major == nil || r.Minor == nil {
			continue
		}
		if n, ok := renumbered[numberOf(r.Type, *r.Major, *r.Minor)]; ok {
			rules[i].Type, rules[i].Major, rules[i].Minor = n.kind, new(n.major), new(n.minor)
		}
	}
	spec.Process.Env = guestAddresses(spec.Process.Env, addresses)
	return nil
}

type deviceNumber struct {
	kind         string
	major, minor int64
}

func numberOf(kind string, major, minor int64) deviceNumber {
	if kind == "u" { // an unbuffered character device, as mknod(1) calls it
		kind = "c"
	}
	return deviceNumber{kind, major, minor}
}
