package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
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

// image makes a disk image of 1 MiB for root's eyes only.
func image(t *testing.T) hypervisor.Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return hypervisor.Disk{ID: "a", Path: path}
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

func TestPlugShare(t *testing.T) {
	var conn *os.File // QEMU's end
	hangUp := qmptest.Do(func() { conn.Close() })
	chardev := qmptest.Steps(ask("getfd", `{"fdname":"share-1"}`), qmptest.TakeFile(func(f *os.File) { conn = f }),
		ask("chardev-add", `{"backend":{"data":{"addr":{"data":{"str":"share-1"},"type":"fd"},"server":false},"type":"socket"},"id":"backend-share-1"}`))
	device := ask("device_add", `{"addr":"0x1","bus":"hotplug","chardev":"backend-share-1","driver":"vhost-user-fs-pci","id":"share-1","queue-size":1024,"tag":"x"}`)
	noChardev := ask("chardev-remove", `{"id":"backend-share-1"}`)
	share := hypervisor.Share{Tag: "x", Dir: "/"}
	t.Run("life", func(t *testing.T) {
		vm := scripted(t, chardev, device, ask("device_del"), deleted("share-1"), qmptest.Expect("chardev-remove"), hangUp, qmptest.Return(nil))
		if path, err := vm.PlugShare(within(t), share); path != "02/01" || err != nil {
			t.Fatalf("path %q, %v", path, err)
		}
		if p := vm.Processes(); len(p) != 1 || p[0].Role != roleVirtiofsd {
			t.Errorf("processes %v", p)
		}
		if err := vm.UnplugShare(within(t), "x"); err != nil {
			t.Error(err)
		}
		wantPlugged(t, vm)
		if p := vm.Processes(); len(p) != 0 || vm.isDown() {
			t.Errorf("processes %v, down %v", p, vm.isDown())
		}
	})
	t.Run("refused", func(t *testing.T) {
		vm := scripted(t, chardev, refuse("device_add"), qmptest.Expect("device_del"), absent, noChardev, hangUp)
		_, err := vm.PlugShare(within(t), share)
		wantError(t, err, nil, "plug share x: qmp device_add")
		wantPlugged(t, vm)
		if p := vm.Processes(); len(p) != 0 || vm.isDown() {
			t.Errorf("processes %v, down %v", p, vm.isDown())
		}
	})
	t.Run("refused, and the daemon stays", func(t *testing.T) {
		vm := scripted(t, chardev, refuse("device_add"), qmptest.Expect("device_del"), absent, noChardev)
		_, err := vm.PlugShare(within(t), share)
		wantError(t, err, nil, "plug share x: qmp device_add")
		if p := vm.Processes(); len(p) != 0 || vm.isDown() {
			t.Errorf("processes %v, down %v", p, vm.isDown())
		}
		conn.Close()
	})
	t.Run("daemon fails", func(t *testing.T) {
		made := make(chan *VM, 1)
		ended := qmptest.Do(func() {
			vm := <-made
			vm.mu.Lock()
			p := vm.processes[0]
			vm.mu.Unlock()
			await(t, "end of the daemon", p.done)
		})
		vm := scripted(t, chardev, hangUp, ended, refuse("device_add"), qmptest.Expect("device_del"), absent, noChardev)
		made <- vm
		vm.launcher.env = append(vm.launcher.env, behaviour{virtiofsd: "exit"}.env()...)
		_, err := vm.PlugShare(within(t), share)
		wantError(t, err, nil, "virtiofsd ended: exit status 1: virtiofsd: no share today")
		if vm.isDown() {
			t.Error("the machine ended with a share that it never had")
		}
	})
	t.Run("daemon dies later", func(t *testing.T) {
		vm := scripted(t, chardev, device, hangUp)
		if _, err := vm.PlugShare(within(t), share); err != nil {
			t.Fatal(err)
		}
		await(t, "end of the machine", vm.Done())
		wantError(t, vm.Err(), errdefs.ErrUnavailable, "virtiofsd ended")
	})
	t.Run("nonsense", func(t *testing.T) {
		vm := scripted(t)
		_, err := vm.PlugShare(within(t), hypervisor.Share{Tag: "y", Dir: "here"})
		wantError(t, err, errdefs.ErrInvalidArgument, "not absolute")
		vm.spec.Shares = []hypervisor.Share{share}
		_, err = vm.PlugShare(within(t), share)
		wantError(t, err, errdefs.ErrAlreadyExists, "since boot")
		vm.opts.Host.Virtiofsd = ""
		_, err = vm.PlugShare(within(t), hypervisor.Share{Tag: "z", Dir: "/"})
		wantError(t, err, errdefs.ErrFailedPrecondition, "install virtiofsd")
		wantPlugged(t, vm)
	})
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
