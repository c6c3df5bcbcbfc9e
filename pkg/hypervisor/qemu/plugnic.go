package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// PlugNIC adds a network card and returns where the guest finds it: the slots
// of bridge and card, "02/05". Each tap is one pair of queues, made by the
// caller (with IFF_VNET_HDR, and IFF_MULTI_QUEUE when there are several); vhost
// has as many of /dev/vhost-net, or none. The caller keeps its descriptors.
func (vm *VM) PlugNIC(ctx context.Context, nic hypervisor.NIC, taps, vhost []*os.File) (_ string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("plug nic %s: %w", nic.ID, err)
		}
	}()
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	err = nic.Validate()
	if len(taps) == 0 || len(vhost) != 0 && len(vhost) != len(taps) {
		err = errors.Join(err, fmt.Errorf("%d taps and %d of vhost-net", len(taps), len(vhost)))
	}
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	p, err := vm.plug(ctx, hypervisor.Plugged{Kind: hypervisor.KindNIC, ID: nic.ID}, busSlots, func(p *plug) []step {
		files := &lent{vm: vm}
		return []step{files.step(), vm.netdev(p, files, taps, vhost), vm.nic(p, nic, len(taps))}
	})
	if err != nil {
		return "", err
	}
	return pciPath(p.Slot), nil
}

// UnplugNIC removes a network card that was plugged.
func (vm *VM) UnplugNIC(ctx context.Context, id string) error {
	if err := vm.unplug(ctx, id, hypervisor.KindNIC); err != nil {
		return fmt.Errorf("unplug nic %s: %w", id, err)
	}
	return nil
}

func (vm *VM) netdev(p *plug, files *lent, taps, vhost []*os.File) step {
	lend := func(kind string, list []*os.File) string {
		var names []string
		for i, f := range list {
			name := fmt.Sprintf("%s-%s%d", p.name(), kind, i)
			files.add(name, f)
			names = append(names, name)
		}
		return strings.Join(names, ":")
	}
	args := properties{"type": "tap", "id": p.backend(), "fds": lend("tap", taps)}
	if len(vhost) > 0 {
		args["vhost"], args["vhostfds"] = true, lend("vhost", vhost)
	}
	return files.takenBy(step{
		do: func(ctx context.Context) error { return vm.qmp.Execute(ctx, "netdev_add", args, nil) },
		undo: func(ctx context.Context) error {
			return vm.qmp.Execute(ctx, "netdev_del", properties{"id": p.backend()}, nil)
		},
	})
}

func (vm *VM) nic(p *plug, nic hypervisor.NIC, queues int) step {
	args := properties{"netdev": p.backend(), "mac": nic.MAC, "romfile": ""} // QEMU's user can't read the ROM's file
	if queues > 1 {
		// One interrupt for each queue, one for the control queue, one for the configuration.
		args["mq"], args["vectors"] = true, 2*queues+2
	}
	if nic.MTU != 0 {
		args["host_mtu"] = nic.MTU
	}
	return vm.pciDevice(p, "virtio-net-pci", args)
}
