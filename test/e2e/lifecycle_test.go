package e2e

import (
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestE2EKill(tt *testing.T) {
	each(tt, func(t *test) {
		id := t.spawn(nil, "sh", "-c", "trap 'exit 3' TERM; touch /tmp/ready; while :; do sleep 0.1; done")
		t.eventually("the trap is set", func() bool {
			return t.try("", "task", "exec", "--exec-id", execID(), id, "test", "-e", "/tmp/ready").code == 0
		})
		t.equal("status", t.status(id), "RUNNING")
		t.ctr("task", "kill", "-s", "SIGTERM", id)
		t.eventually("the task is stopped", func() bool { return t.status(id) == "STOPPED" })
		t.equal("exit code", t.deleteTask(id), 3)
		t.equal("status after delete", t.status(id), "no task")

		if r := t.try("", "task", "kill", id); r.code == 0 || !strings.Contains(r.stderr, "not found") {
			t.Errorf("kill of a deleted task: exit code %d, stderr %q", r.code, r.stderr)
		}
		// The container is still there, and can be started again.
		t.ctr("task", "start", "--detach", id)
		t.equal("status of the second task", t.status(id), "RUNNING")
		t.ctr("task", "kill", "-s", "SIGKILL", id)
		t.eventually("the task is stopped", func() bool { return t.status(id) == "STOPPED" })
		t.equal("exit code of the second task", t.deleteTask(id), 137)
	})
}

func TestE2EDeleteRunning(tt *testing.T) {
	once(tt, func(t *test) {
		id := t.spawn(nil, "sleep", "1000")
		if r := t.try("", "task", "delete", id); r.code == 0 {
			t.Error("a running task was deleted")
		}
		t.equal("status", t.status(id), "RUNNING")
		if r := t.try("", runArgs([]string{"--detach"}, id, "true")...); r.code == 0 || !strings.Contains(r.stderr, "already exists") {
			t.Errorf("a second container of the name: exit code %d, stderr %q", r.code, r.stderr)
		}
		t.equal("exec after it", t.exec(id, "echo", "fine"), "fine\n")
	})
}

func TestE2EPause(tt *testing.T) {
	once(tt, func(t *test) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "ticks"), "")
		id := t.spawn(bind(dir, "/data", "rbind:rw"), "sh", "-c", "while :; do echo >> /data/ticks; sleep 0.05; done")
		ticks := func() int { return strings.Count(read(t, filepath.Join(dir, "ticks")), "\n") }
		t.eventually("it counts", func() bool { return ticks() > 2 })

		t.ctr("task", "pause", id)
		t.equal("status", t.status(id), "PAUSED")
		paused := ticks()
		time.Sleep(500 * time.Millisecond)
		t.equal("ticks while paused", ticks(), paused)

		t.ctr("task", "resume", id)
		t.equal("status", t.status(id), "RUNNING")
		t.eventually("it counts again", func() bool { return ticks() > paused+2 })
	})
}

func TestE2EPs(tt *testing.T) {
	once(tt, func(t *test) {
		id := t.spawn(nil, "sh", "-c", "sleep 1000 & wait")
		pid := t.pid(id)
		if err := syscall.Kill(pid, 0); pid <= 1 || err != nil {
			t.Errorf("task pid %d is no process of the host: %v", pid, err)
		}
		t.eventually("all processes are listed", func() bool {
			n := 0
			for line := range strings.Lines(t.ctr("task", "ps", id)) {
				if pid, _, _ := strings.Cut(strings.TrimSpace(line), " "); pid != "" {
					if p, err := strconv.Atoi(strings.Fields(line)[0]); err == nil && p > 0 {
						n++
					}
				}
			}
			return n == 2
		})
	})
}

// What a container wrote into its own root is there for the next task, and
// not for other containers.
func TestE2ERootIsWritable(tt *testing.T) {
	once(tt, func(t *test) {
		a, b := t.id("a"), t.id("b")
		for _, id := range []string{a, b} {
			t.ctr(runArgs([]string{"--detach"}, id, "sleep", "1000")...)
		}
		t.exec(a, "sh", "-c", "echo mine > /root/file; rm /bin/vi; mkdir -p /x/y")
		t.equal("in the container", t.exec(a, "cat", "/root/file"), "mine\n")
		if r := t.try("", "task", "exec", "--exec-id", "other", b, "cat", "/root/file"); r.code == 0 {
			t.Error("the other container sees the file")
		}
		t.ctr("task", "kill", "-s", "SIGKILL", a)
		t.eventually("the task is stopped", func() bool { return t.status(a) == "STOPPED" })
		t.deleteTask(a)
		t.ctr("task", "start", "--detach", a)
		t.equal("for the next task", t.exec(a, "cat", "/root/file"), "mine\n")
	})
}
