package qemu

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// PlugShare adds a share, which the guest mounts by its tag, and returns where
// it finds it: the slots of bridge and share, "02/05". From then on the machine
// ends with the share's virtiofsd, as with those of boot.
func (vm *VM) PlugShare(ctx context.Context, share hypervisor.Share) (_ string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("plug share %s: %w", share.Tag, err)
		}
	}()
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return "", err
	}
	defer end()
	if err := share.Validate(); err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, s := range vm.spec.Shares {
		if s.Tag == share.Tag {
			return "", fmt.Errorf("there is one since boot: %w", errdefs.ErrAlreadyExists)
		}
	}
	return vm.plugShare(ctx, share)
}

func (vm *VM) plugShare(ctx context.Context, share hypervisor.Share) (string, error) {
	daemon := &shareDaemon{vm: vm, share: share}
	defer func() { _ = daemon.conn.Close() }() // nil when there was none
	p, err := vm.plug(ctx, hypervisor.Plugged{Kind: hypervisor.KindShare, ID: share.Tag}, busSlots, daemon.steps)
	if err != nil {
		return "", err
	}
	return pciPath(p.Slot), nil
}

// UnplugShare removes a share that was plugged. The guest should have unmounted
// it: what still uses it there gets errors.
func (vm *VM) UnplugShare(ctx context.Context, tag string) error {
	if err := vm.unplug(ctx, tag, hypervisor.KindShare); err != nil {
		return fmt.Errorf("unplug share %s: %w", tag, err)
	}
	return nil
}

// A shareDaemon is the back end of one plugged share.
type shareDaemon struct {
	vm      *VM
	share   hypervisor.Share
	process *process
	conn    *os.File // for QEMU, which gets its own
}

func (d *shareDaemon) steps(p *plug) []step {
	files := &lent{vm: d.vm}
	return []step{d.run(p, files), files.step(), d.vm.chardev(p, files), d.device(p), d.guard()}
}

func (d *shareDaemon) run(p *plug, files *lent) step {
	return step{
		do: func(context.Context) (err error) {
			d.process, d.conn, err = d.vm.startVirtiofsd(fmt.Sprintf("p%d", p.Slot), d.share, true)
			files.add(p.name(), d.conn)
			return err
		},
		undo: func(ctx context.Context) error {
			if d.process != nil {
				d.vm.dismiss(ctx, d.process)
			}
			return nil
		},
	}
}

// chardev is the connection to a back end, of the name that it was lent under.
func (vm *VM) chardev(p *plug, files *lent) step {
	socket := properties{"addr": properties{"type": "fd", "data": properties{"str": p.name()}}, "server": false}
	return files.takenBy(step{
		do: func(ctx context.Context) error {
			return vm.qmp.Execute(ctx, "chardev-add", properties{
				"id": p.backend(), "backend": properties{"type": "socket", "data": socket},
			}, nil)
		},
		undo: func(ctx context.Context) error {
			return vm.qmp.Execute(ctx, "chardev-remove", properties{"id": p.backend()}, nil)
		},
	})
}

func (d *shareDaemon) device(p *plug) step {
	device := d.vm.pciDevice(p, "vhost-user-fs-pci", properties{"chardev": p.backend(), "tag": d.share.Tag, "queue-size": 1024})
	return step{
		do: func(ctx context.Context) error {
			err := device.do(ctx)
			if err != nil {
				err = d.explain(err)
			}
			return err
		},
		undo: func(ctx context.Context) error {
			err := device.undo(ctx)
			if err == nil {
				d.vm.setOptional(d.process, true) // it ends with its connection
			}
			return err
		},
	}
}

// explain adds what virtiofsd said to what QEMU made of it.
func (d *shareDaemon) explain(err error) error {
	select {
	case <-d.process.done:
		said := strings.Join(tail(d.process.output.String(), shown), " | ")
		return fmt.Errorf("%s ended: %s: %s: %w", roleVirtiofsd, d.process.end(), said, err)
	case <-time.After(grace):
		return err
	}
}

// guard makes the machine end with the daemon.
func (d *shareDaemon) guard() step {
	return step{
		do: func(context.Context) error {
			if !d.vm.setOptional(d.process, false) {
				return d.explain(fmt.Errorf("share is gone: %w", errdefs.ErrUnavailable))
			}
			return nil
		},
		undo: func(context.Context) error { return nil }, // when the device is gone
	}
}
