package vm

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// TestVMContainers drives the agent as a host does, at the level of the wire. One
// machine serves all its parts, which clean up behind themselves.
func TestVMContainers(t *testing.T) {
	m := sandbox(t)
	for _, part := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"life", testLife},
		{"environment", testEnvironment},
		{"exec", testExec},
		{"errors", testErrors},
		{"users", testUsers},
		{"signals", testSignals},
		{"waiters", testWaiters},
		{"terminal", testTerminal},
		{"streams", testStreams},
		{"plain streams", testPlainStreams},
		{"pause", testPause},
		{"update", testUpdate},
		{"stats", testStats},
		{"oom", testOOM},
		{"pid namespace", testPIDNamespace},
		{"sysctls", testSysctls},
		{"seccomp", testSeccomp},
		{"storages", testStorages},
		{"devices", testDevices},
		{"guest", testGuest},
		{"leftovers", testLeftovers},
	} {
		t.Run(part.name, func(t *testing.T) {
			part.test(t, m.on(t))
		})
	}
	testDestroy(t, m)
}

// class is the errdefs class of an error from the agent.
func class(err error) error { return errdefs.Resolve(errgrpc.ToNative(err)) }

func wantClass(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(class(err), want) {
		t.Errorf("%s: got %v (%v), want %v", what, class(err), err, want)
	}
}

func testLife(t *testing.T, m *machine) {
	m.create("life", nil, "/bin/sh", "-c", "echo started > /started; exec sleep 1000")
	pids := m.pids("life")
	if len(pids) != 1 || pids[0].GetExecId() != "life" {
		t.Errorf("pids of a created container: %v", pids)
	}
	if m.fileExists("life", "started") {
		t.Error("a created container runs already")
	}
	m.startContainer("life")
	m.eventually("it runs", func() bool { return m.fileExists("life", "started") })
	_, err := m.agent.StartContainer(m.ctx(), &protocol.StartContainerRequest{ContainerId: "life"})
	wantClass(t, "second start", err, errdefs.ErrFailedPrecondition)
	wantClass(t, "second create", m.tryCreate("life", nil, "/bin/true"), errdefs.ErrAlreadyExists)
	m.remove("life")
	_, err = m.agent.RemoveContainer(m.ctx(), &protocol.RemoveContainerRequest{ContainerId: "life"})
	wantClass(t, "second remove", err, errdefs.ErrNotFound)
	// Nothing of it is left: the same id is free again.
	for _, status := range []int32{0, 1, 3} {
		if _, _, got := m.run("life", nil, "/bin/sh", "-c", "exit "+string('0'+status)); got != status {
			t.Errorf("exit status %d, want %d", got, status)
		}
	}
	out, errs, status := m.run("life", nil, "/bin/sh", "-c", "echo out; echo err >&2; kill -9 $$; sleep 5")
	if out != "out\n" || errs != "err\n" || status != 0 && status != 137 {
		t.Errorf("got %q, %q, %d", out, errs, status)
	}
}

func testEnvironment(t *testing.T, m *machine) {
	out, _, _ := m.run("env", func(r *protocol.CreateContainerRequest) {
		r.OCI.Root.Readonly = true
		r.OCI.Process.Env = append(r.OCI.Process.Env, "FOO=bar")
		r.OCI.Process.Cwd = "/tmp"
		r.OCI.Process.Rlimits = []*protocol.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 99}}
		r.OCI.Process.OOMScoreAdj = 123
		r.OCI.Hostname = "pod"
	}, "/bin/sh", "-c", `hostname; pwd; echo $FOO; ulimit -n; cat /proc/self/oom_score_adj; touch /x 2>&1; cat /proc/1/cgroup;
		ip -o link show lo | grep -c LOWER_UP; ls /proc | grep -c '^[0-9]'; touch /dev/shm/x && echo shm; cat /proc/kcore | wc -c; readlink /proc/self/ns/net`)
	lines := strings.Split(out, "\n")
	want := []string{"pod", "/tmp", "bar", "77", "123", "touch: /x: Read-only file system", "0::/", "1"}
	for i, w := range want {
		if i >= len(lines) || lines[i] != w {
			t.Errorf("line %d: want %q in %q", i, w, lines)
		}
	}
	if !strings.Contains(out, "shm\n0\n") {
		t.Errorf("no shm or kcore: %q", out)
	}
	net1 := lines[len(lines)-2]
	out, _, _ = m.run("env", nil, "/bin/readlink", "/proc/self/ns/net")
	if !strings.HasPrefix(net1, "net:[") || strings.TrimSpace(out) != net1 {
		t.Errorf("containers are in different networks: %q, %q", net1, out)
	}
}

func testExec(t *testing.T, m *machine) {
	m.create("exec", nil, "/bin/sleep", "1000")
	m.startContainer("exec")
	defer m.remove("exec")
	out, status := m.exec("exec", "e1", nil, "/bin/sh", "-c", "readlink /proc/1/ns/pid; readlink /proc/self/ns/pid; hostname; cat /proc/self/cgroup; cat /proc/self/timerslack_ns; exit 7")
	f := strings.Fields(out)
	if status != 7 || len(f) != 5 || f[0] != f[1] || f[2] != "pod" || f[3] != "0::/" || f[4] != "50000" {
		t.Errorf("got %q, %d", out, status)
	}
	if out, _, _ := m.run("slack", nil, "/bin/cat", "/proc/self/timerslack_ns"); out != "50000\n" {
		t.Errorf("timers of a first process may be %q ns late", out)
	}
	// The same exec id again, now that it was waited for.
	if out, status = m.exec("exec", "e1", nil, "/bin/echo", "again"); out != "again\n" || status != 0 {
		t.Errorf("got %q, %d", out, status)
	}
	_, err := m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "exec", ExecId: "e2", Process: process("/bin/sleep", "1000")})
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "exec", ExecId: "e2", Process: process("/bin/true")})
	wantClass(t, "exec with a used id", err, errdefs.ErrAlreadyExists)
	ids := map[string]bool{}
	for _, p := range m.pids("exec") {
		ids[p.GetExecId()] = true
	}
	if len(ids) != 2 || !ids["exec"] || !ids["e2"] {
		t.Errorf("pids: %v", m.pids("exec"))
	}
	m.signal("exec", "e2", 9, false)
	if got := m.wait("exec", "e2").GetStatus(); got != 137 {
		t.Errorf("status %d, want 137", got)
	}
	m.signal("exec", "exec", 9, false)
	m.wait("exec", "exec")
	_, err = m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "exec", ExecId: "e3", Process: process("/bin/true")})
	wantClass(t, "exec in a stopped container", err, errdefs.ErrFailedPrecondition)
}

func testErrors(t *testing.T, m *machine) {
	wantText := func(what string, err error, texts ...string) {
		t.Helper()
		for _, text := range texts {
			if err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v, want %q", what, err, text)
			}
		}
	}
	start := time.Now()
	wantText("missing command", m.tryCreate("bad", nil, "/bin/nothing"), "/bin/nothing", "no such file")
	wantText("missing command in PATH", m.tryCreate("bad", nil, "nothing"), "nothing", "executable file not found")
	wantText("command without permission", m.tryCreate("bad", nil, "/etc/passwd"), "permission denied")
	wantText("working directory", m.tryCreate("bad", func(r *protocol.CreateContainerRequest) { r.OCI.Process.Cwd = "/etc/passwd" }, "/bin/true"), "/etc/passwd")
	err := m.tryCreate("bad", func(r *protocol.CreateContainerRequest) { r.OCI.Process.Cwd = "tmp" }, "/bin/true")
	wantClass(t, "relative working directory", err, errdefs.ErrInvalidArgument)
	wantText("root file system", m.tryCreate("bad", func(r *protocol.CreateContainerRequest) { r.OCI.Root.Path = shareDir + "/none/rootfs" }, "/bin/true"), "none/rootfs", "no such file")
	err = m.tryCreate("bad", func(r *protocol.CreateContainerRequest) { r.OCI.Process.Args = nil })
	wantClass(t, "no arguments", err, errdefs.ErrInvalidArgument)
	err = m.tryCreate("bad", func(r *protocol.CreateContainerRequest) { r.StringUser = &protocol.StringUser{Uid: "nobody-here"} }, "/bin/true")
	wantClass(t, "unknown user", err, errdefs.ErrInvalidArgument)
	err = m.tryCreate("bad", func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{{Driver: "9p", MountPoint: "/run/kata-containers/x"}}
	}, "/bin/true")
	wantClass(t, "unknown storage driver", err, errdefs.ErrNotImplemented)
	err = m.tryCreate("bad", func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{{Driver: "ephemeral", Source: "tmpfs", MountPoint: "/etc"}}
	}, "/bin/true")
	wantClass(t, "mount point elsewhere", err, errdefs.ErrInvalidArgument)
	for _, id := range []string{"", "..", "a/b", ".hidden", strings.Repeat("x", 256), "a b"} {
		_, err := m.agent.CreateContainer(m.ctx(), &protocol.CreateContainerRequest{ContainerId: id, OCI: spec("bad", "/bin/true")})
		wantClass(t, "container id "+id, err, errdefs.ErrInvalidArgument)
	}
	if d := time.Since(start); d > vmtest.Within(30*time.Second) {
		t.Errorf("errors took %v", d)
	}
	// None of them left anything.
	m.create("bad", nil, "/bin/sleep", "100")
	m.startContainer("bad")
	_, err = m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "bad", ExecId: "e", Process: process("nothing")})
	wantText("exec of a missing command", err, "executable file not found")
	// Nor does an exec that the limit of pids ends, at whatever step.
	limit := func(pids int64) {
		_, err := m.agent.UpdateContainer(m.ctx(), &protocol.UpdateContainerRequest{
			ContainerId: "bad", Resources: &protocol.LinuxResources{Pids: &protocol.LinuxPids{Limit: pids}},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for pids := int64(1); pids < 4; pids++ {
		limit(pids)
		_, err = m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "bad", ExecId: "e", Process: process("/bin/sleep", "1000")})
		wantText("exec beyond the limit of pids", err, "Resource temporarily unavailable")
	}
	limit(-1)
	if got := m.inContainer("bad", "/bin/cat", "/sys/fs/cgroup/pids.current"); got != "2" { // with cat
		t.Errorf("%s processes count", got)
	}
	if out, status := m.exec("bad", "e", nil, "/bin/echo", "fine"); out != "fine\n" || status != 0 {
		t.Errorf("got %q, %d", out, status)
	}
	for name, call := range map[string]func() error{
		"start": func() error {
			_, err := m.agent.StartContainer(m.ctx(), &protocol.StartContainerRequest{ContainerId: "no"})
			return err
		},
		"exec": func() error {
			_, err := m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "no", ExecId: "e", Process: process("true")})
			return err
		},
		"wait": func() error {
			_, err := m.agent.WaitProcess(m.ctx(), &protocol.WaitProcessRequest{ContainerId: "bad", ExecId: "no"})
			return err
		},
		"signal": func() error {
			_, err := m.agent.SignalProcess(m.ctx(), &protocol.SignalProcessRequest{ContainerId: "no", Signal: 9})
			return err
		},
		"stats": func() error {
			_, err := m.agent.StatsContainer(m.ctx(), &protocol.StatsContainerRequest{ContainerId: "no"})
			return err
		},
		"pids": func() error { _, err := m.ext.Pids(m.ctx(), &extension.PidsRequest{ContainerId: "no"}); return err },
		"resize": func() error {
			_, err := m.agent.TtyWinResize(m.ctx(), &protocol.TtyWinResizeRequest{ContainerId: "no"})
			return err
		},
		"read": func() error {
			_, err := m.agent.ReadStdout(m.ctx(), &protocol.ReadStreamRequest{ContainerId: "no", Len: 1})
			return err
		},
		"remove": func() error {
			_, err := m.agent.RemoveContainer(m.ctx(), &protocol.RemoveContainerRequest{ContainerId: "no"})
			return err
		},
	} {
		wantClass(t, name, call(), errdefs.ErrNotFound)
	}
	m.remove("bad")
}

func testUsers(t *testing.T, m *machine) {
	out, _, _ := m.run("user", func(r *protocol.CreateContainerRequest) {
		r.StringUser = &protocol.StringUser{Uid: "alice", AdditionalGids: []string{"7"}}
	}, "/bin/id")
	if out != "uid=1000(alice) gid=1001(users) groups=7,50(staff)\n" {
		t.Errorf("by name: %q", out)
	}
	out, _, _ = m.run("user", func(r *protocol.CreateContainerRequest) {
		r.OCI.Process.User = &protocol.User{UID: 12, GID: 13, AdditionalGids: []uint32{14}}
	}, "/bin/sh", "-c", "id -u; id -g; id -G; echo x > /dev/stdout")
	if out != "12\n13\n13 14\nx\n" {
		t.Errorf("by number: %q", out)
	}
}

func testSignals(t *testing.T, m *machine) {
	t.Run("term kills an init without a handler", func(t *testing.T) {
		m := m.on(t)
		m.create("sig", nil, "/bin/sleep", "1000")
		m.startContainer("sig")
		m.eventually("exec'd", func() bool { return m.comm("sig") == "sleep" })
		if _, err := m.agent.SignalProcess(m.ctx(), &protocol.SignalProcessRequest{ContainerId: "sig", ExecId: "sig", Signal: 15}); err != nil {
			t.Fatal(err)
		}
		if got := m.wait("sig", "sig").GetStatus(); got != 137 {
			t.Errorf("status %d, want 137", got)
		}
		m.remove("sig")
	})
	t.Run("term reaches a handler", func(t *testing.T) {
		m := m.on(t)
		m.create("sig", nil, "/bin/sh", "-c", "trap 'exit 5' TERM; touch /ready; while :; do sleep 0.1; done")
		m.startContainer("sig")
		m.eventually("handler", func() bool { return m.fileExists("sig", "ready") })
		if _, err := m.agent.SignalProcess(m.ctx(), &protocol.SignalProcessRequest{ContainerId: "sig", ExecId: "sig", Signal: 15}); err != nil {
			t.Fatal(err)
		}
		if got := m.wait("sig", "sig").GetStatus(); got != 5 {
			t.Errorf("status %d, want 5", got)
		}
		_, err := m.ext.Signal(m.ctx(), &extension.SignalRequest{ContainerId: "sig", ExecId: "sig", Signal: 15})
		wantClass(t, "signal after wait", err, errdefs.ErrNotFound)
		m.remove("sig")
	})
	t.Run("runc's way", func(t *testing.T) {
		m := m.on(t)
		m.create("sig", nil, "/bin/sleep", "1000")
		m.startContainer("sig")
		m.eventually("exec'd", func() bool { return m.comm("sig") == "sleep" })
		m.signal("sig", "sig", 15, false) // not seen by an init without a handler
		if _, err := m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "sig", ExecId: "e", Process: process("/bin/sleep", "1000")}); err != nil {
			t.Fatal(err)
		}
		m.signal("sig", "e", 15, false)
		if got := m.wait("sig", "e").GetStatus(); got != 143 {
			t.Errorf("exec: status %d, want 143", got)
		}
		m.signal("sig", "", 9, true)
		if got := m.wait("sig", "sig").GetStatus(); got != 137 {
			t.Errorf("init: status %d, want 137", got)
		}
		if pids := m.pids("sig"); len(pids) != 0 {
			t.Errorf("left: %v", pids)
		}
		m.remove("sig")
	})
	t.Run("kill without a process kills all", func(t *testing.T) {
		m := m.on(t)
		m.create("sig", nil, "/bin/sleep", "1000")
		m.startContainer("sig")
		if _, err := m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "sig", ExecId: "e", Process: process("/bin/sleep", "1000")}); err != nil {
			t.Fatal(err)
		}
		if _, err := m.agent.SignalProcess(m.ctx(), &protocol.SignalProcessRequest{ContainerId: "sig", Signal: 9}); err != nil {
			t.Fatal(err)
		}
		if a, b := m.wait("sig", "sig").GetStatus(), m.wait("sig", "e").GetStatus(); a != 137 || b != 137 {
			t.Errorf("status %d and %d", a, b)
		}
		m.remove("sig")
	})
	t.Run("a created container", func(t *testing.T) {
		m := m.on(t)
		m.create("sig", nil, "/bin/sleep", "1000")
		m.signal("sig", "sig", 9, false)
		if got := m.wait("sig", "sig").GetStatus(); got != 137 {
			t.Errorf("status %d, want 137", got)
		}
		_, err := m.agent.StartContainer(m.ctx(), &protocol.StartContainerRequest{ContainerId: "sig"})
		wantClass(t, "start of a dead container", err, errdefs.ErrFailedPrecondition)
		m.remove("sig")
	})
}

func testWaiters(t *testing.T, m *machine) {
	m.create("wait", nil, "/bin/sh", "-c", "sleep 1; exit 9")
	m.startContainer("wait")
	defer m.remove("wait")
	type answer struct {
		status int32
		err    error
	}
	answers := make(chan answer, 5)
	for range 5 {
		go func() {
			resp, err := m.agent.WaitProcess(m.ctx(), &protocol.WaitProcessRequest{ContainerId: "wait", ExecId: "wait"})
			answers <- answer{resp.GetStatus(), err}
		}()
	}
	before := time.Now()
	for range 5 {
		if a := <-answers; a.err != nil || a.status != 9 {
			t.Errorf("got %+v", a)
		}
	}
	if time.Since(before) < 300*time.Millisecond {
		t.Error("the wait did not wait")
	}
	_, err := m.agent.WaitProcess(m.ctx(), &protocol.WaitProcessRequest{ContainerId: "wait", ExecId: "wait"})
	wantClass(t, "late wait", err, errdefs.ErrNotFound)
}

func (m *machine) pids(id string) []*extension.ProcessInfo {
	m.tb.Helper()
	resp, err := m.ext.Pids(m.ctx(), &extension.PidsRequest{ContainerId: id})
	if err != nil {
		m.tb.Fatal(err)
	}
	return resp.GetProcesses()
}

func (m *machine) signal(id, exec string, sig uint32, all bool) {
	m.tb.Helper()
	if _, err := m.ext.Signal(m.ctx(), &extension.SignalRequest{ContainerId: id, ExecId: exec, Signal: sig, All: all}); err != nil {
		m.tb.Fatal(err)
	}
}
