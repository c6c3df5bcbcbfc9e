package shim

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"

	stats1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	stats2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// QEMU dies: everything in it ends with 137, in order, and what is left is
// deleted as always. The shim's log says why.
func TestShimMachineKilled(t *testing.T) {
	h := newHost(t)
	c := h.bundle("dead", "sleep", "1000").run()
	c.exec("e1", nil, nil, "sleep", "1000")
	begin := time.Now()
	if err := unix.Kill(h.find("qemu-system"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.sink.want(t, "exit dead e1 137", "exit dead dead 137")
	if took := time.Since(begin); took > vmtest.Within(5*time.Second) {
		t.Errorf("the exits took %v", took)
	}
	c.wantStatus(task.Status_STOPPED)
	c.logs("virtual machine is gone")
	c.delete()
	h.sink.wantNoMore(t)
}

// QEMU, or what it cannot do without, dies while the machine boots, or later.
func TestShimHelpersKilled(t *testing.T) {
	h := newHostWith(t, "")
	for i, victim := range []string{"guest=boot", "virtiofsd"} { // the first is QEMU's argument
		c := h.bundle("boot"+string(rune('0'+i)), "sleep", "1000").start()
		done := make(chan error, 1)
		go func() {
			_, err := c.Create(c.ctx(), c.createRequest())
			done <- err
		}()
		_ = unix.Kill(h.await(victim), unix.SIGKILL)
		begin := time.Now()
		if err := <-done; err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("Create whose %s is killed: %v", victim, err)
		}
		if took := time.Since(begin); took > vmtest.Within(5*time.Second) {
			t.Errorf("the error took %v", took)
		}
		c.shutdown()
		h.wantNothing()
	}
	for _, victim := range []string{"virtiofsd", "vhost-device-vsock"} {
		if h.kernelVsock() && victim == "vhost-device-vsock" {
			continue
		}
		c := h.bundle("run-"+victim[:4], "sleep", "1000").run()
		_ = unix.Kill(h.find(victim), unix.SIGKILL)
		h.sink.want(t, "exit "+c.id+" "+c.id+" 137")
		c.logs(victim)
		c.delete()
	}
	h.sink.wantNoMore(t)
}

// The shim dies: the delete command removes everything within its five seconds.
func TestShimKilled(t *testing.T) {
	h := newHost(t)
	c := h.bundle("orphan", "sleep", "1000").run()
	qemu := h.find("qemu-system")
	if err := unix.Kill(h.find("-id\x00orphan\x00"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !alive(qemu) {
		t.Error("the machine died with the shim: a shim could not be replaced under it")
	}
	r := c.cleanup()
	if r.GetExitStatus() != 137 || r.GetPid() != c.pid || time.Since(r.GetExitedAt().AsTime()) > time.Minute {
		t.Errorf("answer %v; the task's pid was %d", r, c.pid)
	}
	h.wantNothing()
	c.cleanup() // again
}

// The guest stands still: what containerd asks after its restart is answered.
func TestShimMachineStopped(t *testing.T) {
	h := newHost(t)
	c := h.bundle("frozen", "sleep", "1000").run()
	qemu := h.find("qemu-system")
	if err := unix.Kill(qemu, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	_ = c.conn.Close()
	c.connect()
	c.wantStatus(task.Status_RUNNING)
	begin := time.Now()
	pids, err := c.Pids(c.ctx(), &taskapi.PidsRequest{ID: c.id})
	if err != nil || len(pids.GetProcesses()) == 0 {
		t.Errorf("Pids: %v, %v", pids, err)
	}
	if _, err := c.Connect(c.ctx(), &taskapi.ConnectRequest{ID: c.id}); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 1500*time.Millisecond {
		t.Errorf("Pids and Connect took %v", took)
	}
	if err := unix.Kill(qemu, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	c.end()
}

// containerd is away while a task ends: it hears of it when it is back.
func TestShimEventsWait(t *testing.T) {
	h := newHost(t)
	c := h.bundle("away", "cat")
	c.io = h.fifos("away", false).read()
	c.run()
	h.sink.down()
	c.io.write("x")
	c.closeIO("")
	c.wait("")
	time.Sleep(200 * time.Millisecond)
	h.sink.up()
	h.sink.want(t, "exit away away 0")
	c.delete()
	h.sink.wantNoMore(t)
}

// The kernel of the guest kills a process, that of the host the machine: OOM comes
// before the exit, and the statistics afterwards say so too.
func TestShimOOM(t *testing.T) {
	h := newHost(t)
	pod := h.bundle("pod", "none").annotate("sandbox", "pod").run()
	c := h.bundle("oom", "sh", "-c", "x=a; while :; do x=$x$x; done").annotate("container", "pod")
	limit := int64(24 << 20)
	c.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
	c.run()
	if code := c.wait(""); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	h.sink.want(t, "oom oom", "exit oom oom 137")
	c.wantKills()
	c.delete()

	d := h.bundle("host", "sh", "-c", "until [ -e /dev/go ]; do sleep 0.1; done; for f in /dev/a /dev/shm/b; do dd if=/dev/zero of=$f bs=1M count=60; done; sleep 1000").
		annotate("container", "pod").run()
	h.limitMemory(16 << 20)
	d.exec("go", nil, nil, "touch", "/dev/go")
	d.wait("go")
	h.sink.want(t, "exit host go 0")
	var events []string
	for range 4 {
		events = append(events, h.sink.next(t))
	}
	for _, id := range []string{"host", "pod"} {
		oom, exit := slices.Index(events, "oom "+id), slices.Index(events, fmt.Sprintf("exit %s %s 137", id, id))
		if oom < 0 || exit < oom {
			t.Errorf("events %q, want an OOM kill of %s and then its exit", events, id)
		}
	}
	d.wantKills()
	d.delete()
	pod.delete()
	h.sink.wantNoMore(t)
}

// limitMemory leaves the machine only so much more of the host's memory than it has.
func (h *host) limitMemory(room int) {
	h.Helper()
	group, usage, limit := "/sys/fs/cgroup", "memory.current", "memory.max"
	if _, err := os.Stat(group + "/cgroup.controllers"); err != nil {
		group, usage, limit = group+"/memory", "memory.usage_in_bytes", "memory.limit_in_bytes"
	}
	group = filepath.Join(group, cgroupsPath())
	text, err := os.ReadFile(filepath.Join(group, usage))
	h.must(err)
	now, err := strconv.Atoi(strings.TrimSpace(string(text)))
	h.must(err)
	h.must(os.WriteFile(filepath.Join(group, limit), []byte(strconv.Itoa(now+room)), 0))
}

// wantKills looks for an OOM kill in the statistics.
func (t *tasks) wantKills() {
	t.Helper()
	r, err := t.Stats(t.ctx(), &taskapi.StatsRequest{ID: t.id})
	if err != nil {
		t.Fatalf("Stats of %s after the exit: %v", t.id, err)
	}
	v, err := typeurl.UnmarshalAny(r.GetStats())
	if err != nil {
		t.Fatal(err)
	}
	var kills uint64
	switch m := v.(type) {
	case *stats1.Metrics:
		kills = m.GetMemoryOomControl().GetOomKill()
	case *stats2.Metrics:
		kills = m.GetMemoryEvents().GetOomKill()
	default:
		t.Errorf("metrics are %T", v)
	}
	if kills == 0 {
		t.Errorf("no kill of %s in %v", t.id, v)
	}
}

// containerd gives up a Create that has come so far.
func TestShimCreateCanceled(t *testing.T) {
	h := newHost(t)
	for i, phase := range []string{sandbox.PhaseShim, sandbox.PhasePrepared, sandbox.PhaseMachine, sandbox.PhaseAgent, sandbox.PhaseSandbox} {
		c := h.bundle("gone"+string(rune('0'+i)), "sleep", "1000").start()
		done := make(chan error, 1)
		go func() {
			_, err := c.Create(c.ctx(), c.createRequest())
			done <- err
		}()
		h.awaitPhase(phase)
		_ = c.conn.Close() // the context of a ttrpc call does not end otherwise
		if err := <-done; err == nil {
			t.Errorf("Create succeeded at once after phase %q", phase)
		}
		c.connect()
		c.shutdown()
		h.wantNothing()
	}
}

// The longest names that containerd allows.
func TestShimLongNames(t *testing.T) {
	h := newHost(t)
	h.ns = strings.Repeat("n", 76)
	h.sink.ns = h.ns
	c := h.bundle(strings.Repeat("c", 76), "true").run()
	if code := c.wait(""); code != 0 {
		t.Errorf("exit code %d", code)
	}
	h.sink.next(t)
	c.delete()
}
