package qemu

import (
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp/qmptest"
)

// pipes stand in for taps.
func pipes(t *testing.T, n int) (files []*os.File) {
	t.Helper()
	for range n {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		files = append(files, r)
		t.Cleanup(func() { r.Close() })
	}
	return files
}

func TestPlugNIC(t *testing.T) {
	get := func(names ...string) qmptest.Step {
		var steps []qmptest.Step
		for _, name := range names {
			steps = append(steps, ask("getfd", fmt.Sprintf(`{"fdname":%q}`, name)), qmptest.TakeFile(drop))
		}
		return qmptest.Steps(steps...)
	}
	closefd := func(names ...string) qmptest.Step {
		var steps []qmptest.Step
		for _, name := range names {
			steps = append(steps, qmptest.Expect("closefd", fmt.Sprintf(`{"fdname":%q}`, name)), no)
		}
		return qmptest.Steps(steps...)
	}
	nic := hypervisor.NIC{ID: "eth0", MAC: "02:00:00:00:00:01"}
	t.Run("one queue", func(t *testing.T) {
		vm := scripted(t, get("nic-1-tap0"), ask("netdev_add", `{"fds":"nic-1-tap0","id":"backend-nic-1","type":"tap"}`),
			ask("device_add", `{"addr":"0x1","bus":"hotplug","driver":"virtio-net-pci","id":"nic-1","mac":"02:00:00:00:00:01","netdev":"backend-nic-1","romfile":""}`),
			ask("device_del", `{"id":"nic-1"}`), deleted("nic-1"), ask("netdev_del", `{"id":"backend-nic-1"}`))
		if path, err := vm.PlugNIC(within(t), nic, pipes(t, 1), nil); path != "02/01" || err != nil {
			t.Fatalf("path %q, %v", path, err)
		}
		wantPlugged(t, vm, hypervisor.Plugged{Kind: hypervisor.KindNIC, ID: "eth0", Slot: 1})
		if err := vm.UnplugNIC(within(t), "eth0"); err != nil {
			t.Error(err)
		}
		wantPlugged(t, vm)
	})
	t.Run("two queues", func(t *testing.T) {
		vm := scripted(t, get("nic-1-tap0", "nic-1-tap1", "nic-1-vhost0", "nic-1-vhost1"),
			ask("netdev_add", `{"fds":"nic-1-tap0:nic-1-tap1","id":"backend-nic-1","type":"tap","vhost":true,"vhostfds":"nic-1-vhost0:nic-1-vhost1"}`),
			ask("device_add", `{"addr":"0x1","bus":"hotplug","driver":"virtio-net-pci","host_mtu":9000,"id":"nic-1","mac":"02:00:00:00:00:01","mq":true,"netdev":"backend-nic-1","romfile":"","vectors":6}`))
		nic := nic
		nic.MTU = 9000
		if _, err := vm.PlugNIC(within(t), nic, pipes(t, 2), pipes(t, 2)); err != nil {
			t.Error(err)
		}
	})
	t.Run("no second descriptor", func(t *testing.T) {
		vm := scripted(t, get("nic-1-tap0"), refuse("getfd"), qmptest.TakeFile(drop), closefd("nic-1-tap0", "nic-1-tap1"))
		_, err := vm.PlugNIC(within(t), nic, pipes(t, 2), nil)
		wantError(t, err, nil, "plug nic eth0: qmp getfd")
		wantPlugged(t, vm)
	})
	t.Run("no netdev", func(t *testing.T) {
		vm := scripted(t, get("nic-1-tap0"), refuse("netdev_add"), qmptest.Expect("netdev_del"), absent, closefd("nic-1-tap0"))
		_, err := vm.PlugNIC(within(t), nic, pipes(t, 1), nil)
		wantError(t, err, nil, "plug nic eth0: qmp netdev_add")
		wantPlugged(t, vm)
	})
	t.Run("no device", func(t *testing.T) {
		vm := scripted(t, get("nic-1-tap0"), ask("netdev_add"), refuse("device_add"), qmptest.Expect("device_del"), absent, ask("netdev_del"))
		_, err := vm.PlugNIC(within(t), nic, pipes(t, 1), nil)
		wantError(t, err, nil, "plug nic eth0: qmp device_add")
		wantPlugged(t, vm)
	})
	t.Run("nonsense", func(t *testing.T) {
		vm := scripted(t)
		_, err := vm.PlugNIC(within(t), hypervisor.NIC{ID: "x", MAC: "01:00:00:00:00:01", MTU: 1}, nil, pipes(t, 1))
		for _, text := range []string{"address", "mtu 1", "0 taps and 1 of vhost-net"} {
			wantError(t, err, errdefs.ErrInvalidArgument, text)
		}
	})
}
