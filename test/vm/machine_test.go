package vm

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/ttrpc"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A machine runs the guest image, and is spoken to at the level of the wire.
type machine struct {
	*vmtest.Machine
	tb testing.TB

	agent  protocol.AgentServiceService
	ext    extension.ExtensionService
	health protocol.HealthService
}

// boot starts a machine whose agent serves. Plain ones go on from a template.
func boot(tb testing.TB, change ...func(*hypervisor.Spec)) *machine {
	tb.Helper()
	if len(change) == 0 {
		return connect(tb, vmtest.Resume(tb))
	}
	return connect(tb, vmtest.Boot(tb, change...))
}

func connect(tb testing.TB, vm *vmtest.Machine) *machine {
	tb.Helper()
	m := &machine{Machine: vm, tb: tb}
	conn, err := m.Dial(m.ctx(), extension.AgentPort)
	if err != nil {
		tb.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	tb.Cleanup(func() { client.Close() })
	m.agent = protocol.NewAgentServiceClient(client)
	m.health = protocol.NewHealthClient(client)
	m.ext = extension.NewExtensionClient(client)
	return m
}

// on is the same machine for a part of a test.
func (m *machine) on(tb testing.TB) *machine {
	part := *m
	part.tb = tb
	return &part
}

// signalShare signals the daemon that serves the share.
func (m *machine) signalShare(sig syscall.Signal) {
	m.tb.Helper()
	for _, pid := range m.sharePIDs() {
		if err := syscall.Kill(pid, sig); err != nil {
			m.tb.Fatal(err)
		}
	}
}

// sharePIDs are virtiofsd's: the daemon is a child of the process that was started
// when it has namespaces of its own.
func (m *machine) sharePIDs() (pids []int) {
	m.tb.Helper()
	for _, p := range m.Processes() {
		if p.Role != "virtiofsd" {
			continue
		}
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.PID, p.PID))
		if err != nil {
			m.tb.Fatal(err)
		}
		for pid := range strings.FieldsSeq(string(children)) {
			n, _ := strconv.Atoi(pid)
			pids = append(pids, n)
		}
		return append(pids, p.PID)
	}
	m.tb.Fatal("no virtiofsd")
	return nil
}
