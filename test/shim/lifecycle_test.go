package shim

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	task2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestShimLifecycle(t *testing.T) {
	h := newHost(t)
	c := h.bundle("life", "sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done")
	c.start()
	c.io = h.fifos("life", false).read()
	c.create()
	c.wantStatus(task.Status_CREATED)
	_, err := c.Create(c.ctx(), c.createRequest())
	c.wantClass("Create twice", errdefs.IsAlreadyExists, err)
	_, err = c.Resume(c.ctx(), &taskapi.ResumeRequest{ID: c.id})
	c.wantClass("Resume before Start", errdefs.IsFailedPrecondition, err)
	c.startTask()
	c.io.await("up\n")
	c.wantStatus(task.Status_RUNNING)
	_, err = c.Start(c.ctx(), &taskapi.StartRequest{ID: c.id})
	c.wantClass("Start twice", errdefs.IsFailedPrecondition, err)
	_, err = c.Delete(c.ctx(), &taskapi.DeleteRequest{ID: c.id})
	c.wantClass("Delete while it runs", errdefs.IsFailedPrecondition, err)

	if _, err := c.Pause(c.ctx(), &taskapi.PauseRequest{ID: c.id}); err != nil {
		t.Fatalf("Pause: %v", err)
	}
	h.sink.want(t, "paused life")
	c.wantStatus(task.Status_PAUSED)
	if _, err := c.Resume(c.ctx(), &taskapi.ResumeRequest{ID: c.id}); err != nil {
		t.Fatalf("Resume: %v", err)
	}
	h.sink.want(t, "resumed life")
	c.wantSmallPages()

	c.kill(unix.SIGTERM)
	if code := c.wait(""); code != 7 {
		t.Errorf("exit code %d, want 7", code)
	}
	h.sink.want(t, "exit life life 7")
	c.wantStatus(task.Status_STOPPED)
	_, err = c.Kill(c.ctx(), &taskapi.KillRequest{ID: c.id, Signal: uint32(unix.SIGKILL)})
	c.wantClass("Kill after the exit", errdefs.IsNotFound, err)
	c.wantClass("Exec after the exit", errdefs.IsFailedPrecondition, c.addExec("late", nil, nil, "true"))
	if code := c.wait(""); code != 7 { // as often as anybody likes
		t.Errorf("exit code %d, want 7", code)
	}
	c.delete()
	h.sink.wantNoMore(t)
}

// wantSmallPages looks at what the shim has most memory in, its heap: the kernel
// may make no huge pages of it.
func (t *tasks) wantSmallPages() {
	t.Helper()
	r, err := t.Connect(t.ctx(), &taskapi.ConnectRequest{ID: t.id})
	if err != nil {
		t.Fatal(err)
	}
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", r.GetShimPid()))
	if err != nil {
		t.Fatal(err)
	}
	var most, kib int
	var flags string
	for line := range strings.Lines(string(smaps)) {
		switch f := strings.Fields(line); f[0] {
		case "Anonymous:":
			if kib, err = strconv.Atoi(f[1]); err != nil {
				t.Fatal(err)
			}
		case "VmFlags:": // the last line of a mapping
			if kib > most {
				most, flags = kib, line
			}
		}
	}
	if !strings.Contains(flags, " nh") { // MADV_NOHUGEPAGE
		t.Errorf("%d KiB of the shim's memory have %s", most, flags)
	}
}

// Unknown ids are told apart from everything else.
func TestShimUnknown(t *testing.T) {
	h := newHost(t)
	c := h.bundle("one", "sleep", "1000").run()
	for what, call := range map[string]func(id, execID string) error{
		"State": func(id, e string) error {
			_, err := c.State(c.ctx(), &taskapi.StateRequest{ID: id, ExecID: e})
			return err
		},
		"Start": func(id, e string) error {
			_, err := c.Start(c.ctx(), &taskapi.StartRequest{ID: id, ExecID: e})
			return err
		},
		"Delete": func(id, e string) error {
			_, err := c.Delete(c.ctx(), &taskapi.DeleteRequest{ID: id, ExecID: e})
			return err
		},
		"Kill": func(id, e string) error {
			_, err := c.Kill(c.ctx(), &taskapi.KillRequest{ID: id, ExecID: e, Signal: 9})
			return err
		},
		"Wait": func(id, e string) error {
			_, err := c.Wait(c.ctx(), &taskapi.WaitRequest{ID: id, ExecID: e})
			return err
		},
		"CloseIO": func(id, e string) error {
			_, err := c.CloseIO(c.ctx(), &taskapi.CloseIORequest{ID: id, ExecID: e, Stdin: true})
			return err
		},
		"ResizePty": func(id, e string) error {
			_, err := c.ResizePty(c.ctx(), &taskapi.ResizePtyRequest{ID: id, ExecID: e})
			return err
		},
	} {
		c.wantClass(what+" of an unknown task", errdefs.IsNotFound, call("other", ""))
		c.wantClass(what+" of an unknown process", errdefs.IsNotFound, call("one", "other"))
	}
	for what, err := range map[string]error{
		"Pids":   func() error { _, err := c.Pids(c.ctx(), &taskapi.PidsRequest{ID: "other"}); return err }(),
		"Pause":  func() error { _, err := c.Pause(c.ctx(), &taskapi.PauseRequest{ID: "other"}); return err }(),
		"Resume": func() error { _, err := c.Resume(c.ctx(), &taskapi.ResumeRequest{ID: "other"}); return err }(),
		"Stats":  func() error { _, err := c.Stats(c.ctx(), &taskapi.StatsRequest{ID: "other"}); return err }(),
		"Update": func() error { _, err := c.Update(c.ctx(), &taskapi.UpdateTaskRequest{ID: "other"}); return err }(),
		"Exec": func() error {
			_, err := c.Exec(c.ctx(), &taskapi.ExecProcessRequest{ID: "other", ExecID: "x"})
			return err
		}(),
	} {
		c.wantClass(what+" of an unknown task", errdefs.IsNotFound, err)
	}
	_, err := c.Checkpoint(c.ctx(), &taskapi.CheckpointTaskRequest{ID: "one"})
	c.wantClass("Checkpoint", errdefs.IsNotImplemented, err)
	r, err := c.Connect(c.ctx(), &taskapi.ConnectRequest{ID: "one"})
	if err != nil || r.GetTaskPid() != c.pid || int(r.GetShimPid()) != h.find("-id\x00one\x00") {
		t.Errorf("Connect: %v, %v", r, err)
	}
	// A task that runs keeps the shim.
	if _, err := c.Shutdown(c.ctx(), &taskapi.ShutdownRequest{ID: "one"}); err != nil {
		t.Error(err)
	}
	c.wantStatus(task.Status_RUNNING)
	c.end()
}

// A task that was created and never started is killed and deleted.
func TestShimNeverStarted(t *testing.T) {
	h := newHost(t)
	c := h.bundle("never", "sleep", "1000").start().create()
	c.kill(unix.SIGKILL)
	if code := c.wait(""); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	h.sink.want(t, "exit never never 137")
	c.delete()
	h.sink.wantNoMore(t)

	d := h.bundle("never2", "sleep", "1000").start().create()
	if _, err := d.Delete(d.ctx(), &taskapi.DeleteRequest{ID: d.id}); err != nil { // without having been killed
		t.Errorf("Delete: %v", err)
	}
	h.sink.want(t, "exit never2 never2 137", "delete never2")
	d.shutdown()
	h.sink.wantNoMore(t)
}

// The task API's version 2, as containerd before 2.3 speaks it.
func TestShimVersion2(t *testing.T) {
	h := newHost(t)
	c := h.bundle("two", "sh", "-c", "exit 3").start()
	tasks := task2.NewTTRPCTaskClient(c.conn)
	if _, err := tasks.Create(c.ctx(), &task2.CreateTaskRequest{ID: "two", Bundle: c.bundle}); err != nil {
		t.Fatal(err)
	}
	if _, err := tasks.Start(c.ctx(), &task2.StartRequest{ID: "two"}); err != nil {
		t.Fatal(err)
	}
	r, err := tasks.Wait(c.ctx(), &task2.WaitRequest{ID: "two"})
	if err != nil || r.GetExitStatus() != 3 {
		t.Errorf("Wait: %v, %v", r, err)
	}
	h.sink.want(t, "create two", "start two", "exit two two 3")
	d, err := tasks.Delete(c.ctx(), &task2.DeleteRequest{ID: "two"})
	if err != nil || d.GetExitStatus() != 3 || time.Since(d.GetExitedAt().AsTime()) > time.Minute {
		t.Errorf("Delete: %v, %v", d, err)
	}
	h.sink.want(t, "delete two")
	c.shutdown()
}

// What cannot be run is an error of Create or Start, and leaves nothing.
func TestShimCannotRun(t *testing.T) {
	for name, change := range map[string]func(*tasks){
		"no command": func(c *tasks) { c.spec.Process.Args = []string{"/no/such/command"} },
		"bad cwd":    func(c *tasks) { c.spec.Process.Cwd = "/bin/sh" },
		"no rootfs":  func(c *tasks) { c.spec.Root.Path = "elsewhere" },
		"no netns": func(c *tasks) {
			c.spec.Linux.Namespaces[4].Path = "/run/netns/no-such-namespace"
		},
		"hook": func(c *tasks) {
			c.spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/bin/true"}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			c := h.bundle("bad", "true")
			change(c)
			c.start()
			begin := time.Now()
			_, err := c.Create(c.ctx(), c.createRequest())
			if err == nil {
				h.sink.want(t, "create bad")
				_, err = c.Start(c.ctx(), &taskapi.StartRequest{ID: "bad"})
				if err == nil {
					t.Error("it runs")
				}
				if _, err := c.Delete(c.ctx(), &taskapi.DeleteRequest{ID: "bad"}); err != nil {
					t.Errorf("Delete: %v", err)
				}
			}
			t.Logf("%v: %v", time.Since(begin), err)
			c.shutdown()
		})
	}
}
