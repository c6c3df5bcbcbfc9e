package shim

import (
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
)

func (t *tasks) deleteExec(id string) {
	t.Helper()
	if _, err := t.Delete(t.ctx(), &taskapi.DeleteRequest{ID: t.id, ExecID: id}); err != nil {
		t.Errorf("Delete %s: %v", id, err)
	}
}

func TestShimExec(t *testing.T) {
	h := newHost(t)
	c := h.bundle("exec", "sleep", "1000").run()

	f := h.fifos("e1", false).read()
	c.exec("e1", f, nil, "sh", "-c", "cat; echo done >&2; exit 5")
	f.write("hello\n")
	f.await("hello\n")
	f.write("world\n")
	if _, err := c.CloseIO(c.ctx(), &taskapi.CloseIORequest{ID: c.id, ExecID: "e1", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if code := c.wait("e1"); code != 5 {
		t.Errorf("exit code %d, want 5", code)
	}
	h.sink.want(t, "exit exec e1 5")
	if out := f.output(); out != "hello\nworld\n" || f.stderrText() != "done\n" {
		t.Errorf("output %q, %q", out, f.stderrText())
	}
	c.wantClass("Exec of an id that is there", errdefs.IsAlreadyExists, c.addExec("e1", nil, nil, "true"))
	c.deleteExec("e1")

	// One that was never started.
	if err := c.addExec("e2", nil, nil, "true"); err != nil {
		t.Fatal(err)
	}
	h.sink.want(t, "exec-added exec e2")
	c.deleteExec("e2")

	// One that cannot be started: an error at once.
	if err := c.addExec("e3", nil, nil, "/no/such/command"); err != nil {
		t.Fatal(err)
	}
	h.sink.want(t, "exec-added exec e3")
	begin := time.Now()
	_, err := c.Start(c.ctx(), &taskapi.StartRequest{ID: c.id, ExecID: "e3"})
	if err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("start of a command that is not there: %v", err)
	}
	if took := time.Since(begin); took > vmtest.Within(10*time.Second) {
		t.Errorf("the error took %v", took)
	}
	c.deleteExec("e3")

	// Killed, alone.
	c.exec("e4", nil, nil, "sleep", "1000")
	pids, err := c.Pids(c.ctx(), &taskapi.PidsRequest{ID: c.id})
	if err != nil || len(pids.GetProcesses()) != 2 {
		t.Errorf("Pids: %v, %v; want 2", pids, err)
	}
	named := 0
	for _, p := range pids.GetProcesses() {
		var details options.ProcessDetails
		if p.GetInfo() != nil && p.GetInfo().MessageIs(&details) {
			if err := p.GetInfo().UnmarshalTo(&details); err != nil || details.GetExecID() != "e4" {
				t.Errorf("details %v, %v", &details, err)
			}
			named++
		}
	}
	if named != 1 {
		t.Errorf("%d of %v have an exec id, want 1", named, pids)
	}
	if _, err := c.Kill(c.ctx(), &taskapi.KillRequest{ID: c.id, ExecID: "e4", Signal: uint32(unix.SIGKILL)}); err != nil {
		t.Error(err)
	}
	if code := c.wait("e4"); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	h.sink.want(t, "exit exec e4 137")
	c.deleteExec("e4")

	// The container's end is the last one.
	c.exec("e5", nil, nil, "sleep", "1000")
	c.kill(unix.SIGKILL)
	h.sink.want(t, "exit exec e5 137", "exit exec exec 137")
	c.delete()
	h.sink.wantNoMore(t)
}

// An exec'd process that leaves a child with its output ends all the same.
func TestShimExecLeavesChild(t *testing.T) {
	h := newHost(t)
	c := h.bundle("child", "sleep", "1000").run()
	f := h.fifos("e1", false).read()
	c.exec("e1", f, nil, "sh", "-c", "echo started; sleep 1000 & exit 0")
	begin := time.Now()
	if code := c.wait("e1"); code != 0 {
		t.Errorf("exit code %d", code)
	}
	c.deleteExec("e1")
	if took := time.Since(begin); took > vmtest.Within(8*time.Second) {
		t.Errorf("exit and delete took %v", took)
	}
	if out := f.output(); out != "started\n" {
		t.Errorf("output %q", out)
	}
	h.sink.want(t, "exit child e1 0")
	c.end()
}

// A terminal has the size that it was given before its process started.
func TestShimTerminal(t *testing.T) {
	h := newHost(t)
	c := h.bundle("tty", "sh", "-c", "stty size; trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.1; done")
	c.spec.Process.Terminal = true
	c.spec.Process.ConsoleSize = &specs.Box{Height: 31, Width: 101}
	c.io = h.fifos("tty", true).read()
	c.run()
	c.io.await("31 101\r\n")
	c.io.await("ready")
	if _, err := c.ResizePty(c.ctx(), &taskapi.ResizePtyRequest{ID: c.id, Height: 42, Width: 132}); err != nil {
		t.Fatal(err)
	}
	c.io.await("42 132\r\n")
	if code := c.wait(""); code != 4 {
		t.Errorf("exit code %d, want 4", code)
	}
	h.sink.want(t, "exit tty tty 4")
	c.delete()

	d := h.bundle("tty2", "sleep", "1000").run()
	f := h.fifos("e1", true).read()
	terminal := func(p *specs.Process) { p.Terminal = true }
	if err := d.addExec("e1", f, terminal, "sh", "-c", "stty size; read x; echo got $x"); err != nil {
		t.Fatal(err)
	}
	h.sink.want(t, "exec-added tty2 e1")
	if _, err := d.ResizePty(d.ctx(), &taskapi.ResizePtyRequest{ID: d.id, ExecID: "e1", Height: 24, Width: 90}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Start(d.ctx(), &taskapi.StartRequest{ID: d.id, ExecID: "e1"}); err != nil {
		t.Fatal(err)
	}
	f.await("24 90\r\n")
	f.write("typed\n")
	f.await("got typed\r\n")
	d.wait("e1")
	h.sink.want(t, "exec-started tty2 e1", "exit tty2 e1 0")
	d.deleteExec("e1")
	d.wantStatus(task.Status_RUNNING)
	d.end()
}
