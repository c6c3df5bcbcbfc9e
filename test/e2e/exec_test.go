package e2e

import (
	"strings"
	"testing"
)

func TestE2EExec(tt *testing.T) {
	each(tt, func(t *test) {
		id := t.spawn(nil, "sleep", "1000")

		r := t.try("", "task", "exec", "--exec-id", "code", id, "sh", "-c", "echo out; echo err >&2; exit 9")
		t.equal("stdout", r.stdout, "out\n")
		t.equal("last line of stderr", lastLine(r.stderr), "err")
		t.equal("exit code", r.code, 9)

		r = t.try("hello\n", "task", "exec", "--exec-id", "line", id, "cat")
		if r.stdout != "hello\n" || r.code != 0 {
			t.Errorf("a line of stdin: %q came back, exit code %d: %s", r.stdout, r.code, r.stderr)
		}
		input := strings.Repeat("0123456789abcde\n", 8<<10)
		r = t.try(input, "task", "exec", "--exec-id", "stdin", id, "cat")
		if r.stdout != input || r.code != 0 {
			t.Errorf("stdin: %d bytes came back of %d, exit code %d: %s", len(r.stdout), len(input), r.code, r.stderr)
		}

		t.equal("user and directory", t.ctr("task", "exec", "--exec-id", "user", "--user", "1000:1000", "--cwd", "/tmp", id, "sh", "-c", "id -u; pwd"), "1000\n/tmp\n")
	})
}

func TestE2EExecFaults(tt *testing.T) {
	once(tt, func(t *test) {
		id := t.spawn(nil, "sleep", "1000")
		for name, r := range map[string]result{
			"command not found": t.try("", "task", "exec", "--exec-id", "a", id, "/no/such/command"),
			"no directory":      t.try("", "task", "exec", "--exec-id", "b", "--cwd", "/no/such/dir", id, "true"),
			"no container":      t.try("", "task", "exec", "--exec-id", "c", "nobody", "true"),
		} {
			if r.code == 0 || !strings.Contains(r.stderr, "no") {
				t.Errorf("%s: exit code %d, stderr %q", name, r.code, r.stderr)
			}
		}
		t.equal("exec after the faults", t.exec(id, "echo", "fine"), "fine\n")

		t.ctr("task", "kill", "-s", "SIGKILL", id)
		t.eventually("the task is stopped", func() bool { return t.status(id) == "STOPPED" })
		if r := t.try("", "task", "exec", "--exec-id", "d", id, "true"); r.code == 0 {
			t.Error("exec in a stopped container succeeded")
		}
	})
}

// An exec'd process ends with the container, and its exec is told so.
func TestE2EExecEndsWithContainer(tt *testing.T) {
	once(tt, func(t *test) {
		id := t.spawn(nil, "sleep", "1000")
		ended := make(chan result, 1)
		go func() {
			defer close(ended) // try may give up
			ended <- t.try("", "task", "exec", "--exec-id", "long", id, "sleep", "2000")
		}()
		t.eventually("the process runs", func() bool { return strings.Contains(t.exec(id, "ps"), "sleep 2000") })
		t.ctr("task", "kill", "-s", "SIGKILL", id)
		t.equal("exit code of the exec", (<-ended).code, 137)
	})
}
