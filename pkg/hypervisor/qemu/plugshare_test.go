package qemu

import (
	"os"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp/qmptest"
)

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
