package e2e

import (
	"os"
	"strings"
	"syscall"
	"testing"
)

// Containers outlive the daemon, and their exits are told to the next one.
func TestE2ERestart(tt *testing.T) {
	each(tt, func(t *test) {
		dir := t.TempDir()
		id := t.spawn(bind(dir, "/data", "rbind:rw"), "sh", "-c", "while ! [ -e /data/end ]; do sleep 0.1; done; exit 6")
		pid := t.pid(id)
		if err := t.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.equal("status", t.status(id), "RUNNING")
		t.equal("pid", t.pid(id), pid)
		t.equal("exec", t.exec(id, "echo", "fine"), "fine\n")
		write(t, dir+"/end", "")
		t.eventually("the task is stopped", func() bool { return t.status(id) == "STOPPED" })
		t.equal("exit code", t.deleteTask(id), 6)
	})
}

// A container that ends while no daemon runs has ended for the next one. What
// remains of it is up to the daemon, which deletes a task without processes.
func TestE2EExitWithoutDaemon(tt *testing.T) {
	each(tt, func(t *test) {
		dir := t.TempDir()
		id := t.spawn(bind(dir, "/data", "rbind:rw"), "sh", "-c", "while ! [ -e /data/end ]; do sleep 0.1; done; echo > /data/ended; exit 6")
		if err := t.Stop(); err != nil {
			t.Fatal(err)
		}
		write(t, dir+"/end", "")
		t.eventually("the process ends", func() bool { _, err := os.Stat(dir + "/ended"); return err == nil })
		if err := t.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.eventually("the task has ended", func() bool { return t.status(id) != "RUNNING" })
	})
}

// A machine that does not answer is not a container that is gone.
func TestE2ERestartWhileMachineHangs(tt *testing.T) {
	each(tt, func(t *test) {
		needMachine(t)
		id := t.spawn(nil, "sleep", "1000")
		qemu := t.process(id, "qemu-system")
		if err := syscall.Kill(qemu, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = syscall.Kill(qemu, syscall.SIGCONT) }()
		if err := t.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.equal("status", t.status(id), "RUNNING")
		if err := syscall.Kill(qemu, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		t.equal("exec", t.exec(id, "echo", "fine"), "fine\n")
	})
}

func TestE2EShimKilled(tt *testing.T) {
	each(tt, func(t *test) {
		needMachine(t) // runc's shim leaves its socket
		id := t.spawn(nil, "sleep", "1000")
		events := t.watch()
		if err := syscall.Kill(t.process(id, "containerd-shim-"), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		t.eventually("the task is gone or stopped", func() bool { s := t.status(id); return s == "STOPPED" || s == "no task" || s == "UNKNOWN" })
		events.sees("/tasks/exit", id)
	})
}

func TestE2EMachineKilled(tt *testing.T) {
	for _, program := range []string{"qemu-system", "virtiofsd", "vhost-device-vsock"} {
		tt.Run(program, func(tt *testing.T) {
			each(tt, func(t *test) {
				needMachine(t)
				id := t.spawn(nil, "sleep", "1000")
				events := t.watch()
				pid, ok := t.find(id, program)
				if !ok {
					t.Skipf("machines have no %s here", program) // vsock of the kernel
				}
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				t.eventually("the task is stopped", func() bool { return t.status(id) == "STOPPED" })
				events.sees("/tasks/exit", id)
				t.equal("exit code", t.deleteTask(id), 137)
			})
		})
	}
}

// process is the pid of the container's shim or of a program of its machine.
func (t *test) process(id, program string) int {
	t.Helper()
	pid, ok := t.find(id, program)
	if !ok {
		t.Fatalf("no %s of %s", program, id)
	}
	return pid
}

// find looks among what the daemon started. Only one container may run.
func (t *test) find(id, program string) (int, bool) {
	t.Helper()
	all, err := t.Processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if strings.Contains(p.Args[0], program) && !strings.Contains(strings.Join(p.Args, " "), " anchor") {
			return p.PID, true
		}
	}
	return 0, false
}
