package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// PlugDisk adds a virtio-blk disk and returns where the guest finds it: the
// slots of bridge and disk, "02/05".
func (vm *VM) PlugDisk(ctx context.Context, disk hypervisor.Disk) (string, error) {
	p, err := vm.plugDisk(ctx, disk, hypervisor.KindDisk, func(p *plug, _ string) step {
		return vm.pciDevice(p, "virtio-blk-pci", properties{"drive": p.backend(), "serial": disk.ID})
	})
	if err != nil {
		return "", err
	}
	return pciPath(p.Slot), nil
}

// PlugSCSIDisk adds a disk behind a SCSI controller, which comes with the first
// of them, and returns where the guest finds it: target and unit, "5:0".
func (vm *VM) PlugSCSIDisk(ctx context.Context, disk hypervisor.Disk) (string, error) {
	p, err := vm.plugDisk(ctx, disk, hypervisor.KindSCSIDisk, func(p *plug, bus string) step {
		return vm.device(p, "scsi-hd", properties{
			"bus": bus, "drive": p.backend(), "serial": disk.ID,
			"channel": 0, "scsi-id": p.Slot, "lun": 0, // a unit of a target of its own depends on no other
		})
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d:0", p.Slot), nil
}

// UnplugDisk removes a disk that was plugged, of either sort.
func (vm *VM) UnplugDisk(ctx context.Context, id string) error {
	err := vm.unplug(ctx, id, hypervisor.KindDisk, hypervisor.KindSCSIDisk)
	if err != nil {
		return fmt.Errorf("unplug disk %s: %w", id, err)
	}
	return nil
}

func (vm *VM) plugDisk(ctx context.Context, disk hypervisor.Disk, kind hypervisor.Kind, device func(p *plug, bus string) step) (_ *plug, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("plug disk %s: %w", disk.ID, err)
		}
	}()
	if err := disk.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if vm.bootDisk(disk.ID) >= 0 {
		return nil, fmt.Errorf("there is one since boot: %w", errdefs.ErrAlreadyExists)
	}
	file, block, err := openDisk(disk)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	ctx, end, err := vm.begin(ctx) // not before: a kill waits for no file system
	if err != nil {
		return nil, err
	}
	defer end()
	bus, from := bridge, busSlots
	if kind == hypervisor.KindSCSIDisk {
		from = scsiTargets
		if bus, err = vm.scsiController(ctx); err != nil {
			return nil, err
		}
	}
	what := hypervisor.Plugged{Kind: kind, ID: disk.ID, Path: disk.Path}
	return vm.plug(ctx, what, from, func(p *plug) []step {
		return []step{vm.descriptorSet(p, file), vm.blockNode(p, disk, block), device(p, bus)}
	})
}

// setOf is the descriptor set of a disk; those of disks at boot have small numbers.
func setOf(p *plug) int {
	if p.Kind == hypervisor.KindSCSIDisk {
		return 0x200 + p.Slot
	}
	return 0x100 + p.Slot
}

func (vm *VM) descriptorSet(p *plug, file *os.File) step {
	set := setOf(p)
	return step{
		do: func(ctx context.Context) error { return vm.qmp.AddFD(ctx, set, file) },
		undo: func(ctx context.Context) error {
			return vm.qmp.Execute(ctx, "remove-fd", properties{"fdset-id": set}, nil)
		},
	}
}

func (vm *VM) blockNode(p *plug, disk hypervisor.Disk, block bool) step {
	args := properties{
		"driver": "file", "node-name": p.backend(), "filename": fmt.Sprintf("/dev/fdset/%d", setOf(p)),
		"locking": "off", "read-only": disk.ReadOnly,
	}
	if block {
		args["driver"] = "host_device"
	}
	if !disk.ReadOnly {
		args["discard"] = "unmap"
	}
	return step{
		do: func(ctx context.Context) error { return vm.qmp.Execute(ctx, "blockdev-add", args, nil) },
		undo: func(ctx context.Context) error {
			return vm.qmp.Execute(ctx, "blockdev-del", properties{"node-name": p.backend()}, nil)
		},
	}
}

// scsiController plugs the controller when there is none yet, and names its
// bus. It costs a boot nothing, and a machine without SCSI disks no slot.
func (vm *VM) scsiController(ctx context.Context) (bus string, err error) {
	if err := vm.scsiTurn.take(ctx); err != nil {
		return "", err
	}
	defer vm.scsiTurn.give()
	p := vm.plugs.find(hypervisor.KindSCSIController)
	if p == nil {
		p, err = vm.plug(ctx, hypervisor.Plugged{Kind: hypervisor.KindSCSIController}, busSlots, func(p *plug) []step {
			return []step{vm.pciDevice(p, "virtio-scsi-pci", nil)}
		})
		if err != nil {
			return "", fmt.Errorf("scsi controller: %w", err)
		}
	}
	return p.name() + ".0", nil
}

// bootDisk is the index of a disk that was there at boot; negative: it was not.
func (vm *VM) bootDisk(id string) int {
	for i, d := range vm.spec.Disks {
		if d.ID == id {
			return i
		}
	}
	return -1
}

// GrowDisk tells the guest of a disk whose image, or block device, has grown,
// and returns the size in bytes.
func (vm *VM) GrowDisk(ctx context.Context, id string) (size int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("grow disk %s: %w", id, err)
		}
	}()
	var path, node string
	if i := vm.bootDisk(id); i >= 0 {
		path, node = vm.spec.Disks[i].Path, bootNode(i)
	} else {
		p, err := vm.plugs.claim(id, hypervisor.KindDisk, hypervisor.KindSCSIDisk)
		if err != nil {
			return 0, err
		}
		defer vm.plugs.settle(p)
		path, node = p.Path, p.backend()
	}
	if size, err = sizeOf(path); err != nil {
		return 0, err
	}
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	was, err := vm.nodeSize(ctx, node)
	switch {
	case err != nil:
		return 0, err
	case size < was: // QEMU would cut the file
		return 0, fmt.Errorf("%s has %d bytes, %d less than the guest knows: %w", path, size, was-size, errdefs.ErrFailedPrecondition)
	}
	return size, vm.qmp.Execute(ctx, "block_resize", properties{"node-name": node, "size": size}, nil)
}

// sizeOf is the size of a file or of a block device.
func sizeOf(path string) (int64, error) {
	f, _, err := openDisk(hypervisor.Disk{Path: path, ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// nodeSize is the size of a disk as QEMU knows it.
func (vm *VM) nodeSize(ctx context.Context, name string) (int64, error) {
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			VirtualSize int64 `json:"virtual-size"`
		}
	}
	if err := vm.qmp.Execute(ctx, "query-named-block-nodes", properties{"flat": true}, &nodes); err != nil {
		return 0, err
	}
	for _, n := range nodes {
		if n.Name == name {
			return n.Image.VirtualSize, nil
		}
	}
	return 0, errors.New("qemu has no such node")
}
