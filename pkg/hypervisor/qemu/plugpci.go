package qemu

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// PlugPCI adds a device that stands on nothing of the host, by the name of
// QEMU's driver, and returns where the guest finds it: the slots of bridge and
// device, "02/05".
func (vm *VM) PlugPCI(ctx context.Context, device hypervisor.PCIDevice) (_ string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("plug %s %s: %w", device.Driver, device.ID, err)
		}
	}()
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	if device.ID == "" || device.Driver == "" {
		return "", fmt.Errorf("id or driver is empty: %w", errdefs.ErrInvalidArgument)
	}
	p, err := vm.plug(ctx, hypervisor.Plugged{Kind: hypervisor.KindPCI, ID: device.ID}, busSlots, func(p *plug) []step {
		return []step{vm.pciDevice(p, device.Driver, device.Properties)}
	})
	if err != nil {
		return "", err
	}
	return pciPath(p.Slot), nil
}

// UnplugPCI removes a device that PlugPCI added.
func (vm *VM) UnplugPCI(ctx context.Context, id string) error {
	if err := vm.unplug(ctx, id, hypervisor.KindPCI); err != nil {
		return fmt.Errorf("unplug device %s: %w", id, err)
	}
	return nil
}
