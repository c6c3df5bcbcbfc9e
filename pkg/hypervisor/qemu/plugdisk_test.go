package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp/qmptest"
)

// image makes a disk image of 1 MiB for root's eyes only.
func image(t *testing.T) hypervisor.Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return hypervisor.Disk{ID: "a", Path: path}
}

func TestPlugDisk(t *testing.T) {
	disk := image(t)
	vm := scripted(t, plugged, delDevice, deleted("disk-1"), delNode, delSet)
	path, err := vm.PlugDisk(within(t), disk)
	if path != "02/01" || err != nil {
		t.Fatalf("path %q, %v", path, err)
	}
	wantPlugged(t, vm, hypervisor.Plugged{Kind: hypervisor.KindDisk, ID: "a", Slot: 1, Path: disk.Path})
	_, err = vm.PlugDisk(within(t), disk)
	wantError(t, err, errdefs.ErrAlreadyExists, "plug disk a: there is one already")
	_, err = vm.PlugSCSIDisk(within(t), hypervisor.Disk{ID: "b", Path: "/no/disk"})
	wantError(t, err, errdefs.ErrNotFound, "plug disk b: open /no/disk")
	_, err = vm.PlugDisk(within(t), hypervisor.Disk{ID: "B"})
	wantError(t, err, errdefs.ErrInvalidArgument, "not absolute")
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = vm.PlugDisk(within(t), hypervisor.Disk{ID: "b", Path: pipe, ReadOnly: true})
	wantError(t, err, errdefs.ErrInvalidArgument, "neither a file nor a block device")
	if err := vm.UnplugDisk(within(t), "a"); err != nil {
		t.Error(err)
	}
	wantPlugged(t, vm)
	wantError(t, vm.UnplugDisk(within(t), "a"), errdefs.ErrNotFound, "unplug disk a: it was not plugged")
}

func TestPlugBlockDevice(t *testing.T) {
	var s hypervisor.Spec
	withBlockDevice(t)(&s)
	if s.Disks == nil {
		need.Missing(t, "needs a loop device")
	}
	vm := scripted(t, diskSet, qmptest.TakeFile(func(f *os.File) {
		if info, err := f.Stat(); err != nil || info.Mode()&os.ModeDevice == 0 {
			t.Errorf("not a block device: %v, %v", info, err)
		}
		f.Close()
	}), ask("blockdev-add", `{"driver":"host_device","filename":"/dev/fdset/257","locking":"off","node-name":"backend-disk-1","read-only":true}`), ask("device_add"))
	if _, err := vm.PlugDisk(within(t), s.Disks[0]); err != nil {
		t.Error(err)
	}
}

// Whatever step fails, what was done is undone, and the slot is free again.
func TestPlugDiskFails(t *testing.T) {
	taken := qmptest.TakeFile(drop)
	noDevice := qmptest.Steps(qmptest.Expect("device_del", `{"id":"disk-1"}`), absent)
	tests := []struct {
		name   string
		script []qmptest.Step
	}{
		{"descriptor", []qmptest.Step{refuse("add-fd"), taken, refuse("remove-fd")}},
		{"node", []qmptest.Step{diskSet, taken, refuse("blockdev-add"), refuse("blockdev-del"), delSet}},
		{"device", []qmptest.Step{diskSet, taken, diskNode, refuse("device_add"), noDevice, delNode, delSet}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			vm := scripted(t, append(tt.script, plugged)...)
			disk := image(t)
			_, err := vm.PlugDisk(within(t), disk)
			wantError(t, err, nil, "no such luck")
			if strings.Contains(err.Error(), "undo") {
				t.Errorf("error %v", err)
			}
			wantPlugged(t, vm)
			if path, err := vm.PlugDisk(within(t), disk); path != "02/01" || err != nil {
				t.Errorf("path %q, %v", path, err)
			}
		})
	}
}

// A command whose answer nobody waited for may have done its work.
func TestPlugDiskCancelled(t *testing.T) {
	stuck := errors.New("had enough")
	ctx, cancel := context.WithCancelCause(within(t))
	vm := scripted(t, diskSet, qmptest.TakeFile(drop), diskNode, qmptest.Expect("device_add"), qmptest.Do(func() { cancel(stuck) }),
		qmptest.Expect("device_del"), qmptest.Return(nil), deleted("disk-1"), delNode, delSet)
	_, err := vm.PlugDisk(ctx, image(t))
	wantError(t, err, stuck, "qmp device_add: had enough")
	wantPlugged(t, vm)
}

// What can't be undone is remembered, and undone by the next unplug.
func TestPlugDiskUndoFails(t *testing.T) {
	disk := image(t)
	vm := scripted(t, diskSet, qmptest.TakeFile(drop), diskNode, refuse("device_add"), qmptest.Expect("device_del"), absent,
		refuse("blockdev-del"), delNode, delSet)
	_, err := vm.PlugDisk(within(t), disk)
	wantError(t, err, nil, `"no such luck"; undo: qmp blockdev-del`)
	wantPlugged(t, vm, hypervisor.Plugged{Kind: hypervisor.KindDisk, ID: "a", Slot: 1, Path: disk.Path})
	if err := vm.UnplugDisk(within(t), "a"); err != nil {
		t.Error(err)
	}
	wantPlugged(t, vm)
}

// An undo of which nobody knows whether it was done is done again.
func TestPlugDiskUndoLost(t *testing.T) {
	ctx, cancel := context.WithCancel(within(t))
	vm := scripted(t, plugged, qmptest.Expect("device_del"), absent, qmptest.Expect("blockdev-del"), qmptest.Do(cancel),
		refuse("blockdev-del"), refuse("remove-fd"), delSet)
	if _, err := vm.PlugDisk(within(t), image(t)); err != nil {
		t.Fatal(err)
	}
	wantError(t, vm.UnplugDisk(ctx, "a"), context.Canceled, "unplug disk a: qmp blockdev-del")
	wantError(t, vm.UnplugDisk(within(t), "a"), nil, "qmp remove-fd") // which was certainly there
	if err := vm.UnplugDisk(within(t), "a"); err != nil {
		t.Error(err)
	}
	wantPlugged(t, vm)
}

// A guest that does not answer bounds nothing; when it does later, the unplug
// goes on.
func TestUnplugDiskLate(t *testing.T) {
	let := make(chan struct{})
	vm := scripted(t, plugged, delDevice, qmptest.Wait(let), deleted("disk-1"), ask("query-status"), delNode, delSet)
	if _, err := vm.PlugDisk(within(t), image(t)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wantError(t, vm.UnplugDisk(ctx, "a"), context.DeadlineExceeded, "unplug disk a: wait for guest to let disk-1 go")
	if n := len(vm.Plugged()); n != 1 {
		t.Errorf("%d plugged", n)
	}
	close(let)
	if err := vm.qmp.Execute(within(t), "query-status", nil, nil); err != nil { // behind the event
		t.Fatal(err)
	}
	if err := vm.UnplugDisk(within(t), "a"); err != nil {
		t.Error(err)
	}
	wantPlugged(t, vm)
}

// A guest that missed the request is asked again, and QEMU with it: an event
// may have been missed here.
func TestUnplugDiskAsksAgain(t *testing.T) {
	vm := scripted(t, plugged, delDevice, refuse("device_del"), qmptest.Expect("device_del"), absent, delNode, delSet)
	vm.askAgain = 20 * time.Millisecond
	if _, err := vm.PlugDisk(within(t), image(t)); err != nil {
		t.Fatal(err)
	}
	if err := vm.UnplugDisk(within(t), "a"); err != nil {
		t.Error(err)
	}
}

func TestUnplugDiskRefused(t *testing.T) {
	ost := func(status int) any {
		return map[string]any{"info": map[string]any{"device": "disk-1", "slot": "1", "slot-type": "DIMM", "source": 3, "status": status}}
	}
	progress := qmptest.Event("ACPI_DEVICE_OST", ost(0x84))
	for event, step := range map[string]qmptest.Step{
		"DEVICE_UNPLUG_GUEST_ERROR": qmptest.Event("DEVICE_UNPLUG_GUEST_ERROR", map[string]string{"device": "disk-1", "path": "/"}),
		"MEM_UNPLUG_ERROR":          qmptest.Event("MEM_UNPLUG_ERROR", map[string]string{"device": "disk-1", "msg": "busy"}),
		"ACPI_DEVICE_OST":           qmptest.Event("ACPI_DEVICE_OST", ost(0x81)),
	} {
		t.Run(event, func(t *testing.T) {
			vm := scripted(t, plugged, delDevice, progress, step, delDevice, deleted("disk-1"), delNode, delSet)
			if _, err := vm.PlugDisk(within(t), image(t)); err != nil {
				t.Fatal(err)
			}
			wantError(t, vm.UnplugDisk(within(t), "a"), errdefs.ErrFailedPrecondition, "guest keeps it")
			if err := vm.UnplugDisk(within(t), "a"); err != nil { // it has made up its mind
				t.Error(err)
			}
		})
	}
	t.Run("by qemu", func(t *testing.T) {
		vm := scripted(t, plugged, refuse("device_del"))
		if _, err := vm.PlugDisk(within(t), image(t)); err != nil {
			t.Fatal(err)
		}
		wantError(t, vm.UnplugDisk(within(t), "a"), nil, "no such luck")
		if n := len(vm.Plugged()); n != 1 {
			t.Errorf("%d plugged", n)
		}
	})
}

func TestPlugSCSIDisk(t *testing.T) {
	controller := ask("device_add", `{"addr":"0x1","bus":"hotplug","driver":"virtio-scsi-pci","id":"scsi-1"}`)
	add := func(n int, id string) qmptest.Step {
		return qmptest.Steps(ask("add-fd", fmt.Sprintf(`{"fdset-id":%d}`, 0x200+n)), qmptest.TakeFile(drop), ask("blockdev-add"),
			ask("device_add", fmt.Sprintf(`{"bus":"scsi-1.0","channel":0,"drive":"backend-scsi-disk-%d","driver":"scsi-hd","id":"scsi-disk-%[1]d","lun":0,"scsi-id":%[1]d,"serial":%[2]q}`, n, id)))
	}
	vm := scripted(t, refuse("device_add"), qmptest.Expect("device_del"), absent, // no controller: the next one brings it
		controller, add(0, "a"), add(1, "b"),
		ask("device_del", `{"id":"scsi-disk-0"}`), deleted("scsi-disk-0"), ask("blockdev-del"), ask("remove-fd", `{"fdset-id":512}`), add(0, "c"))
	disk := image(t)
	_, err := vm.PlugSCSIDisk(within(t), disk)
	wantError(t, err, nil, "plug disk a: scsi controller: qmp device_add")
	wantPlugged(t, vm)
	for i, id := range []string{"a", "b"} {
		disk.ID = id
		if address, err := vm.PlugSCSIDisk(within(t), disk); address != fmt.Sprintf("%d:0", i) || err != nil {
			t.Errorf("address %q, %v", address, err)
		}
	}
	if err := vm.UnplugDisk(within(t), "a"); err != nil {
		t.Error(err)
	}
	disk.ID = "c"
	if address, err := vm.PlugSCSIDisk(within(t), disk); address != "0:0" || err != nil {
		t.Errorf("address %q, %v", address, err)
	}
}

func TestGrowDisk(t *testing.T) {
	size := func(n int) qmptest.Step {
		return qmptest.Steps(qmptest.Expect("query-named-block-nodes", `{"flat":true}`), qmptest.Return([]any{
			map[string]any{"node-name": "other"},
			map[string]any{"node-name": "backend-disk-1", "image": map[string]int{"virtual-size": n}},
			map[string]any{"node-name": "disk0", "image": map[string]int{"virtual-size": n}},
		}))
	}
	disk := image(t)
	vm := scripted(t, plugged, size(1<<20), ask("block_resize", `{"node-name":"backend-disk-1","size":2097152}`), size(3<<20),
		size(1<<20), ask("block_resize", `{"node-name":"disk0","size":2097152}`))
	vm.spec.Disks = []hypervisor.Disk{{ID: "boot", Path: disk.Path}}
	if _, err := vm.PlugDisk(within(t), disk); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk.Path, 2<<20); err != nil {
		t.Fatal(err)
	}
	if n, err := vm.GrowDisk(within(t), "a"); n != 2<<20 || err != nil {
		t.Errorf("grown to %d, %v", n, err)
	}
	_, err := vm.GrowDisk(within(t), "a")
	wantError(t, err, errdefs.ErrFailedPrecondition, "1048576 less than the guest knows")
	if n, err := vm.GrowDisk(within(t), "boot"); n != 2<<20 || err != nil {
		t.Errorf("grown to %d, %v", n, err)
	}
	_, err = vm.GrowDisk(within(t), "nobody")
	wantError(t, err, errdefs.ErrNotFound, "grow disk nobody")
	_, err = vm.PlugDisk(within(t), hypervisor.Disk{ID: "boot", Path: disk.Path})
	wantError(t, err, errdefs.ErrAlreadyExists, "since boot")
}
