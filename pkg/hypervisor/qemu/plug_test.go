package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp/qmptest"
)

// scripted is a running machine whose QEMU is a script, and says hello as 7.2.
// Every word of the script was said when the test ends.
func scripted(t *testing.T, script ...qmptest.Step) *VM {
	t.Helper()
	return scriptedAs(t, qmptest.Hello(), script...)
}

func scriptedAs(t *testing.T, hello qmptest.Step, script ...qmptest.Step) *VM {
	t.Helper()
	_, opts := fakeMachine(t, behaviour{})
	vm := newVM(spec("amd64", hotplug), opts)
	played := make(chan struct{})
	script = append(append([]qmptest.Step{hello}, script...), qmptest.Do(func() { close(played) }))
	client, err := qmp.Connect(within(t), qmptest.Serve(t, script...), vm.event)
	if err != nil {
		t.Fatal(err)
	}
	vm.qmp = client
	vm.watchers.Go(vm.watchQMP)
	go vm.bury()
	t.Cleanup(func() {
		if !t.Failed() && !vm.isDown() {
			await(t, "end of the script", played)
		}
		_ = vm.Kill()
	})
	return vm
}

// What the scripts say. An ask is a command that succeeds.
var (
	no     = qmptest.Fail("GenericError", "no such luck")
	absent = qmptest.Fail("DeviceNotFound", "Device 'x' not found")
)

func ask(command string, args ...string) qmptest.Step {
	return qmptest.Steps(qmptest.Expect(command, args...), qmptest.Return(nil))
}

func refuse(command string) qmptest.Step { return qmptest.Steps(qmptest.Expect(command), no) }

func drop(file *os.File) { file.Close() }

func deleted(device string) qmptest.Step {
	return qmptest.Steps(
		qmptest.Event("DEVICE_DELETED", map[string]string{"path": "/machine/peripheral/" + device + "/virtio-backend"}),
		qmptest.Event("DEVICE_DELETED", map[string]string{"device": device, "path": "/machine/peripheral/" + device}),
	)
}

// A disk in the first slot of the bus.
var (
	diskSet    = ask("add-fd", `{"fdset-id":257}`)
	diskNode   = ask("blockdev-add", `{"discard":"unmap","driver":"file","filename":"/dev/fdset/257","locking":"off","node-name":"backend-disk-1","read-only":false}`)
	diskDevice = ask("device_add", `{"addr":"0x1","bus":"hotplug","drive":"backend-disk-1","driver":"virtio-blk-pci","id":"disk-1","serial":"a"}`)
	plugged    = qmptest.Steps(diskSet, qmptest.TakeFile(drop), diskNode, diskDevice)

	delDevice = ask("device_del", `{"id":"disk-1"}`)
	delNode   = ask("blockdev-del", `{"node-name":"backend-disk-1"}`)
	delSet    = ask("remove-fd", `{"fdset-id":257}`)
)

func wantPlugged(t *testing.T, vm *VM, want ...hypervisor.Plugged) {
	t.Helper()
	if diff := cmp.Diff(want, vm.Plugged()); diff != "" {
		t.Errorf("plugged (-want +got):\n%s", diff)
	}
}

func wantError(t *testing.T, err, class error, text string) {
	t.Helper()
	if err == nil || class != nil && !errors.Is(err, class) || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v, want %v with %q", err, class, text)
	}
}

// Calls end with the machine, at once, and none begins afterwards.
func TestPlugDeath(t *testing.T) {
	waits := make(chan struct{})
	vm := scripted(t, plugged, delDevice, qmptest.Do(func() { close(waits) }))
	if _, err := vm.PlugDisk(within(t), image(t)); err != nil {
		t.Fatal(err)
	}
	unplug := make(chan error, 1)
	go func() { unplug <- vm.UnplugDisk(context.WithoutCancel(t.Context()), "a") }()
	await(t, "request", waits)
	_, err := vm.PlugDisk(within(t), hypervisor.Disk{ID: "a", Path: image(t).Path})
	wantError(t, err, errdefs.ErrAlreadyExists, "")
	wantError(t, vm.UnplugDisk(within(t), "a"), errdefs.ErrFailedPrecondition, "being plugged or unplugged")
	start := time.Now()
	_ = vm.Kill()
	wantError(t, <-unplug, errdefs.ErrUnavailable, "wait for guest to let disk-1 go: machine is gone: killed")
	if d := time.Since(start); d > time.Second {
		t.Errorf("killed after %v", d)
	}
	_, err = vm.PlugDisk(within(t), image(t))
	wantError(t, err, errdefs.ErrUnavailable, "machine is gone: killed")
}

func TestPlugPCI(t *testing.T) {
	vm := scripted(t, ask("device_add", `{"addr":"0x1","bus":"hotplug","driver":"e1000","id":"pci-1","romfile":""}`),
		ask("device_del", `{"id":"pci-1"}`), deleted("pci-1"))
	path, err := vm.PlugPCI(within(t), hypervisor.PCIDevice{ID: "x", Driver: "e1000", Properties: map[string]any{"romfile": ""}})
	if path != "02/01" || err != nil {
		t.Fatalf("path %q, %v", path, err)
	}
	if err := vm.UnplugPCI(within(t), "x"); err != nil {
		t.Error(err)
	}
	_, err = vm.PlugPCI(within(t), hypervisor.PCIDevice{ID: "x"})
	wantError(t, err, errdefs.ErrInvalidArgument, "driver is empty")
}

func TestSlots(t *testing.T) {
	var ps plugs
	reserve := func(kind hypervisor.Kind, id string, from slots) *plug {
		t.Helper()
		p, err := ps.reserve(hypervisor.Plugged{Kind: kind, ID: id}, from)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	var all []*plug
	for i := 1; i <= 31; i++ { // every kind of the bus shares its slots
		kind := []hypervisor.Kind{hypervisor.KindDisk, hypervisor.KindNIC, hypervisor.KindShare, hypervisor.KindPCI, hypervisor.KindSCSIController}[i%5]
		p := reserve(kind, fmt.Sprint("x", i), busSlots)
		if p.Slot != i {
			t.Errorf("slot %d, want %d", p.Slot, i)
		}
		all = append(all, p)
	}
	_, err := ps.reserve(hypervisor.Plugged{Kind: hypervisor.KindNIC, ID: "y"}, busSlots)
	wantError(t, err, errdefs.ErrResourceExhausted, "no slot for devices left of 31")
	if p := reserve(hypervisor.KindSCSIDisk, "s", scsiTargets); p.Slot != 0 {
		t.Errorf("a scsi disk takes slot %d", p.Slot)
	}
	if p := reserve(hypervisor.KindMemory, "", slots{"memory slot", 0, 0}); p.ID != "0" {
		t.Errorf("a module is called %q", p.ID)
	}
	ps.settle(all[6]) // nothing was done for it
	if p := reserve(hypervisor.KindNIC, "y", busSlots); p.Slot != 7 {
		t.Errorf("slot %d, want the one that is free", p.Slot)
	}
	// Disks of both sorts have one namespace, others their own.
	_, err = ps.reserve(hypervisor.Plugged{Kind: hypervisor.KindDisk, ID: "s"}, busSlots)
	wantError(t, err, errdefs.ErrAlreadyExists, "")
	if list := ps.list(); len(list) != 33 || !slices.IsSortedFunc(list, func(a, b hypervisor.Plugged) int { return strings.Compare(string(a.Kind), string(b.Kind)) }) {
		t.Errorf("list %v", list)
	}
}

// QEMU's events are read by a process that must not fall over them.
func FuzzPlugEvent(f *testing.F) {
	for _, name := range []string{"DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR", "ACPI_DEVICE_OST", "MEMORY_DEVICE_SIZE_CHANGE", "SHUTDOWN"} {
		f.Add(name, []byte(`{"device":"disk-1","path":"/machine/peripheral/disk-1"}`))
		f.Add(name, []byte(`{"info":{"device":"disk-1","slot":"1","slot-type":"DIMM","source":3,"status":129}}`))
		f.Add(name, []byte(`{"device":["disk-1"],"info":-1}`))
		f.Add(name, []byte(``))
	}
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		vm := newVM(spec("amd64"), Options{})
		p, err := vm.plugs.reserve(hypervisor.Plugged{Kind: hypervisor.KindDisk, ID: "a"}, busSlots)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			vm.event(qmp.Event{Name: name, Data: data})
		}
		select {
		case <-p.gone:
			if name != "DEVICE_DELETED" {
				t.Errorf("removed by %s %s", name, data)
			}
		default:
		}
	})
}
