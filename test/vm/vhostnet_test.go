package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// TestKVMVhostNet has two cards carry packets, one by QEMU and one by the kernel.
func TestKVMVhostNet(t *testing.T) {
	vmtest.Need(t, vmtest.KVM)
	m := boot(t, func(s *hypervisor.Spec) { s.KernelParams = append(s.KernelParams, "agent.hotplug_timeout=60") })
	w := newWire(t)
	for i, card := range []struct {
		tap, address string
		vhost        bool
	}{{"tap0", "10.99.0.2", false}, {"tap1", "10.98.0.2", true}} {
		before := m.vhostWorkers()
		var vhost []*os.File
		if card.vhost {
			f, err := os.OpenFile("/dev/vhost-net", os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			vhost = append(vhost, f)
		}
		nic := hypervisor.NIC{ID: fmt.Sprint("n", i), MAC: fmt.Sprintf("02:00:00:00:97:%02x", i)}
		_, err := m.PlugNIC(m.ctx(), nic, w.tapOf(t, card.tap), vhost)
		closeAll(vhost)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.agent.UpdateInterface(m.ctx(), &protocol.UpdateInterfaceRequest{Interface: &types.Interface{
			Name: nic.ID, HwAddr: nic.MAC, Mtu: 1500, IPAddresses: []*types.IPAddress{{Address: card.address, Mask: "24"}},
		}}); err != nil {
			t.Fatal(err)
		}
		if got := m.vhostWorkers() > before; got != card.vhost {
			t.Errorf("%s: the kernel carries packets: %t, want %t", card.tap, got, card.vhost)
		}
	}
	m.createSandbox()
	m.create("c", nil, "/bin/sleep", "100000")
	m.startContainer("c")
	for _, address := range []string{"10.99.0.1", "10.98.0.1"} {
		if out := m.inContainer("c", "/bin/busybox", "nc", "-w", "5", address, "7001"); !strings.Contains(out, "tcp") {
			t.Errorf("%s says %q", address, out)
		}
	}
	workers := m.vhostWorkers()
	if err := m.UnplugNIC(m.ctx(), "n1"); err != nil {
		t.Fatal(err)
	}
	if now := m.vhostWorkers(); now >= workers {
		t.Errorf("%d threads of vhost after an unplug, %d before", now, workers)
	}
}

// vhostWorkers counts the kernel's threads that work for QEMU's devices: they are
// processes of the kernel's own before Linux 6.4, and QEMU's later.
func (m *machine) vhostWorkers() (n int) {
	m.tb.Helper()
	for _, p := range m.Processes() {
		if p.Role != "qemu" {
			continue
		}
		names, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/comm")
		if err != nil {
			m.tb.Fatal(err)
		}
		for _, name := range names {
			text, _ := os.ReadFile(name) // gone: not one of them
			if strings.TrimSpace(string(text)) == fmt.Sprintf("vhost-%d", p.PID) {
				n++
			}
		}
	}
	return n
}
