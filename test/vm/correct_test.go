package vm

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// TestVMCorrect is what other agents of this protocol are known to get wrong.
func TestVMCorrect(t *testing.T) {
	m := sandbox(t)
	for _, part := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"output after the exit is not cut", testLateOutput},
		{"a missing command answers at once", testMissingCommand},
		{"a working directory outside the root is refused", testOutsideCwd},
		{"exec joins the pinned namespaces", testPinnedNamespaces},
		{"a shadowed /proc gives no capabilities", testShadowedProc},
		{"stats and exec do not delay a kill", testBusyKill},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(t, m.on(t)) })
	}
}

// A child that outlives the process still has its output, and the end of the
// output is the child's.
func testLateOutput(t *testing.T, m *machine) {
	m.create("late", nil, "/bin/sleep", "1000")
	m.startContainer("late")
	defer m.remove("late")
	const script = "(sleep 3; echo late) & echo early"
	read := func(exec string) string {
		var all strings.Builder
		for {
			resp, err := m.agent.ReadStdout(m.ctx(), &protocol.ReadStreamRequest{ContainerId: "late", ExecId: exec, Len: 4096})
			if err != nil {
				t.Fatal(err)
			}
			if len(resp.GetData()) == 0 {
				return all.String()
			}
			all.Write(resp.GetData())
		}
	}
	for _, exec := range []string{"calls", "stream"} {
		if _, err := m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "late", ExecId: exec, Process: process("/bin/sh", "-c", script)}); err != nil {
			t.Fatal(err)
		}
		got := ""
		if exec == "stream" {
			out := m.stream("late", exec, extension.Stdout)
			m.wait("late", exec) // long before the child
			got = output(t, out)
		} else {
			got = read(exec)
			m.wait("late", exec)
		}
		if got != "early\nlate\n" {
			t.Errorf("by %s: %q", exec, got)
		}
	}
}

func testMissingCommand(t *testing.T, m *machine) {
	m.create("missing", nil, "/bin/sleep", "1000")
	m.startContainer("missing")
	defer m.remove("missing")
	begin := time.Now()
	m.exec("missing", "there", nil, "/bin/true")
	there := time.Since(begin)
	begin = time.Now()
	_, err := m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "missing", ExecId: "e", Process: process("/bin/missing")})
	if d := time.Since(begin); err == nil || d > 2*there+vmtest.Within(5*time.Second) {
		t.Errorf("after %v: %v; a command that is there took %v", d, err, there)
	}
}

// The agent's descriptors lead out of the container while it is being entered.
func testOutsideCwd(t *testing.T, m *machine) {
	m.create("cwd", nil, "/bin/sleep", "1000")
	m.startContainer("cwd")
	defer m.remove("cwd")
	for fd := 3; fd < 9; fd++ {
		req := &protocol.ExecProcessRequest{ContainerId: "cwd", ExecId: fmt.Sprint("e", fd), Process: process("/bin/ls", ".")}
		req.Process.Cwd = fmt.Sprintf("/proc/self/fd/%d", fd)
		if _, err := m.agent.ExecProcess(m.ctx(), req); err != nil {
			continue
		}
		out := output(t, m.stream("cwd", req.GetExecId(), extension.Stdout))
		m.wait("cwd", req.GetExecId())
		t.Errorf("%s: executed, among %q", req.GetProcess().GetCwd(), out)
	}
}

// withAdmin makes a container whose root may mount and unshare.
func withAdmin(r *protocol.CreateContainerRequest) {
	caps := append([]string{"CAP_SYS_ADMIN"}, allCaps...)
	r.OCI.Process.Capabilities = &protocol.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	r.OCI.Linux.ReadonlyPaths = nil
}

// A first process that moved into namespaces of its own takes nobody along.
func testPinnedNamespaces(t *testing.T, m *machine) {
	m.create("pinned", withAdmin, "/bin/busybox", "unshare", "-m", "-u", "-n", "-i", "/bin/sh", "-c",
		"busybox hostname moved; busybox mount -t tmpfs none /tmp; touch /tmp/moved /root/ready; exec sleep 1000")
	m.startContainer("pinned")
	defer m.remove("pinned")
	m.eventually("moved", func() bool { return m.fileExists("pinned", "root/ready") })
	if out := m.inContainer("pinned", "/bin/sh", "-c", "hostname; ls /tmp"); out != "pod" {
		t.Errorf("an exec sees %q, want the sandbox' hostname and an empty /tmp", out)
	}
}

// What the workload put over /proc/sys/kernel/cap_last_cap must not decide how
// many capabilities are dropped.
func testShadowedProc(t *testing.T, m *machine) {
	m.create("shadow", withAdmin, "/bin/sh", "-c",
		"busybox mkdir /p; busybox mount -t proc proc /p; busybox mount -t tmpfs none /proc; busybox mkdir -p /proc/sys/kernel; "+
			"echo 1 >/proc/sys/kernel/cap_last_cap; touch /root/ready; exec sleep 1000")
	m.startContainer("shadow")
	defer m.remove("shadow")
	m.eventually("shadowed", func() bool { return m.fileExists("shadow", "root/ready") })
	req := &protocol.ExecProcessRequest{ContainerId: "shadow", ExecId: "e", Process: process("/bin/grep", "CapBnd", "/p/self/status")}
	req.Process.NoNewPrivileges = false
	if _, err := m.agent.ExecProcess(m.ctx(), req); err == nil { // else it is refused
		out := output(t, m.stream("shadow", "e", extension.Stdout))
		m.wait("shadow", "e")
		if strings.TrimSpace(out) != "CapBnd:\t00000000080420eb" { // allCaps
			t.Errorf("an exec got %q", out)
		}
	}
}

func testBusyKill(t *testing.T, m *machine) {
	for _, id := range []string{"busy", "victim"} {
		m.create(id, nil, "/bin/sleep", "1000")
		m.startContainer(id)
	}
	ctx, stop := context.WithCancel(m.ctx())
	defer stop()
	var jobs sync.WaitGroup
	for range 8 {
		jobs.Go(func() {
			for ctx.Err() == nil {
				_, _ = m.agent.StatsContainer(ctx, &protocol.StatsContainerRequest{ContainerId: "victim"})
			}
		})
	}
	for i := range 2 {
		jobs.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				id := fmt.Sprintf("e%d-%d", i, n)
				req := &protocol.ExecProcessRequest{ContainerId: []string{"busy", "victim"}[i%2], ExecId: id, Process: process("/bin/true")}
				_, _ = m.agent.ExecProcess(ctx, req)
			}
		})
	}
	select {
	case <-time.After(2 * time.Second): // they are all at it
	case <-ctx.Done():
	}
	begin := time.Now()
	if _, err := m.health.Check(m.ctx(), &protocol.CheckRequest{}); err != nil {
		t.Error(err)
	}
	nothing := time.Since(begin) // what a call takes that waits for nothing
	begin = time.Now()
	if _, err := m.agent.SignalProcess(m.ctx(), &protocol.SignalProcessRequest{ContainerId: "victim", Signal: 9}); err != nil {
		t.Error(err)
	}
	signalled := time.Since(begin)
	status := m.wait("victim", "victim").GetStatus()
	t.Logf("nothing took %v, the signal %v, the end %v", nothing, signalled, time.Since(begin))
	if status != 137 || signalled > 3*nothing+vmtest.Within(5*time.Second) {
		t.Errorf("status %d; the signal took %v, nothing %v", status, signalled, nothing)
	}
	stop()
	jobs.Wait()
	m.remove("victim")
	m.remove("busy")
}
