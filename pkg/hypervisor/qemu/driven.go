package qemu

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/vsock"
)

// settle is how long vhost-device-vsock gets for the messages by which QEMU tells
// it of a device that the guest begins to drive.
const settle = time.Second

var errNotDriven = fmt.Errorf("guest does not drive its vsock yet: %w", errdefs.ErrUnavailable)

// whenDriven fails at once, and lets nothing through, until the guest has rung or
// has driven its vsock for a moment. vhost-device-vsock (0.3) ends the thread that
// serves the guest when a connection comes in after it was told of the guest's
// memory and before it was told of all queues; the guest is out of reach for good
// then, and nobody says so.
func (vm *VM) whenDriven(dial vsock.Dialer) vsock.Dialer {
	return func(ctx context.Context, port uint32) (net.Conn, error) {
		if err := vm.checkDriven(ctx); err != nil {
			return nil, fmt.Errorf("dial guest port %d: %w", port, err)
		}
		return dial(ctx, port)
	}
}

func (vm *VM) checkDriven(ctx context.Context) error {
	select {
	case <-vm.doorbell.rung:
		return nil
	default:
	}
	if since := vm.drivenSince(); !since.IsZero() && time.Since(since) > vm.settle {
		return nil
	}
	driven, err := vm.drives(ctx)
	switch {
	case errdefs.IsNotImplemented(err): // QEMU before 7.2 can't tell
		return nil
	case err != nil:
		return err
	case driven:
		vm.mu.Lock()
		if vm.driven.IsZero() {
			vm.driven = time.Now()
		}
		vm.mu.Unlock()
	}
	return errNotDriven
}

func (vm *VM) drivenSince() time.Time {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.driven
}

// drives asks QEMU whether the guest's driver has started the vsock.
func (vm *VM) drives(ctx context.Context) (bool, error) {
	var devices []struct{ Name, Path string }
	if err := vm.qmp.Execute(ctx, "x-query-virtio", nil, &devices); err != nil {
		return false, err
	}
	for _, device := range devices {
		if device.Name != "vhost-vsock" { // virtio_device_names in hw/virtio/virtio.c, of either vsock
			continue
		}
		var status struct {
			Started bool `json:"vhost-started"`
		}
		err := vm.qmp.Execute(ctx, "x-query-virtio-status", properties{"path": device.Path}, &status)
		return status.Started, err
	}
	return false, nil // it is being plugged
}
