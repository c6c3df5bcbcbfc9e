package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/vsock"
)

// settle is how often QEMU is asked whether the guest drives its vsock, and how long
// vhost-device-vsock has for the messages by which QEMU tells it.
const settle = time.Second

var errNotDriven = errors.New("guest does not drive its vsock yet")

// whenDriven lets nothing through until the guest has rung or has driven its vsock
// for a moment. vhost-device-vsock (0.3) ends the thread that serves the guest
// when a connection comes in after it was told of the guest's memory and before it
// was told of all queues; the guest is out of reach for good then, and nobody
// says so.
func (vm *VM) whenDriven(dial vsock.Dialer) vsock.Dialer {
	return func(ctx context.Context, port uint32) (net.Conn, error) {
		if err := vm.awaitDriven(ctx); err != nil {
			return nil, fmt.Errorf("dial guest port %d: %w", port, err)
		}
		return dial(ctx, port)
	}
}

func (vm *VM) awaitDriven(ctx context.Context) error {
	for !vm.isDriven() {
		select {
		case <-vm.doorbell.rung:
			return nil
		default:
		}
		driven, err := vm.drives(ctx)
		switch {
		case errdefs.IsNotImplemented(err): // QEMU before 7.2 can't tell
			return nil
		case err != nil:
			return err
		case driven:
			vm.seeDriven()
		}
		select {
		case <-vm.doorbell.rung:
		case <-time.After(vm.settle):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), errNotDriven)
		}
	}
	return nil
}

// isDriven says whether the guest was seen to drive its vsock for long enough.
func (vm *VM) isDriven() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return !vm.driven.IsZero() && time.Since(vm.driven) >= vm.settle
}

func (vm *VM) seeDriven() {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.driven.IsZero() {
		vm.driven = time.Now()
	}
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
