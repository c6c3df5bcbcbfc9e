package vm

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// spy starts a container that sees the guest's own /proc and control groups.
func (m *machine) spy() {
	m.create("spy", func(r *protocol.CreateContainerRequest) {
		r.OCI.Mounts = append(r.OCI.Mounts,
			&protocol.Mount{Destination: "/guest/proc", Source: "/proc", Type: "bind", Options: []string{"rbind"}},
			&protocol.Mount{Destination: "/guest/cgroup", Source: "/sys/fs/cgroup", Type: "bind", Options: []string{"rbind"}},
			&protocol.Mount{Destination: "/guest/run", Source: "/run", Type: "bind", Options: []string{"bind"}},
		)
		caps := append([]string{"CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"}, allCaps...)
		r.OCI.Process.Capabilities = &protocol.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	}, "/bin/sleep", "100000")
	m.startContainer("spy")
}

// state is what a container could have left in the guest.
func (m *machine) state() string {
	m.tb.Helper()
	out, status := m.exec("spy", "look", func(r *protocol.ExecProcessRequest) {
		caps := append([]string{"CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"}, allCaps...)
		r.Process.Capabilities = &protocol.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	}, "/bin/sh", "-c", `
		cd /guest
		agent=$(grep -l '^vmshim-agent.agent' proc/[0-9]*/cmdline | busybox cut -d/ -f2)
		echo mounts of the agent; busybox cut -d' ' -f5- proc/$agent/mountinfo
		echo namespaces; readlink proc/$agent/ns/mnt | busybox wc -l
		echo groups; ls cgroup/vmshim | grep -v '\.'
		echo files; busybox find run/kata-containers -xdev | grep -v look
		echo zombies; grep -l '^State:.Z' proc/[0-9]*/status | busybox wc -l
	`)
	if status != 0 {
		m.tb.Errorf("look: status %d", status)
	}
	return out
}

func (m *machine) agentFiles() (n int) {
	m.tb.Helper()
	resp, err := m.agent.GetMetrics(m.ctx(), &protocol.GetMetricsRequest{})
	if err != nil {
		m.tb.Fatal(err)
	}
	for line := range strings.Lines(resp.GetMetrics()) {
		_, _ = fmt.Sscanf(line, "kata_agent_process_open_fds %d", &n)
	}
	return n
}

// testLeftovers: after many containers the guest is as it was.
func testLeftovers(t *testing.T, m *machine) {
	m.spy()
	use := func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/ephemeral/cycle"}}
	}
	cycle := func() {
		m.create("cycle", use, "/bin/sh", "-c", "sleep 1000 & cat")
		out := m.stream("cycle", "cycle", extension.Stdout)
		m.startContainer("cycle")
		m.exec("cycle", "e", nil, "/bin/echo", "x")
		if err := m.tryCreate("broken", use, "/bin/nothing"); err == nil {
			t.Error("created without a command")
		}
		_, err := m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "cycle", ExecId: "f", Process: process("/bin/nothing")})
		if err == nil {
			t.Error("executed nothing")
		}
		m.signal("cycle", "cycle", 9, false)
		m.wait("cycle", "cycle")
		m.remove("cycle")
		out.Close()
	}
	cycle() // what is made once stays
	before, files := m.state(), m.agentFiles()
	for range 10 {
		cycle()
	}
	if diff := cmp.Diff(before, m.state()); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
	m.eventually("the agent has no more files open", func() bool { return m.agentFiles() <= files })
	m.remove("spy")
}
