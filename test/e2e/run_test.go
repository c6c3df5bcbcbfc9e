package e2e

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

func TestE2ERun(tt *testing.T) {
	each(tt, func(t *test) {
		r := t.run("sh", "-c", "echo out; echo err >&2; exit 7")
		t.equal("stdout", r.stdout, "out\n")
		t.equal("last line of stderr", lastLine(r.stderr), "err") // ctr writes warnings there
		t.equal("exit code", r.code, 7)
	})
}

func TestE2EKernel(tt *testing.T) {
	once(tt, func(t *test) {
		needMachine(t)
		host, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			t.Fatal(err)
		}
		r := t.run("sh", "-c", "cat /proc/sys/kernel/random/boot_id; uname -r; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; nproc")
		lines := strings.Fields(r.stdout)
		if r.code != 0 || len(lines) != 4 {
			t.Fatalf("%+v", r)
		}
		if lines[0] == strings.TrimSpace(string(host)) {
			t.Error("the container runs under the host's kernel")
		}
		if kib, _ := strconv.Atoi(lines[2]); kib < 128<<10 || kib > 256<<10 {
			t.Errorf("the guest has %d KiB of memory, want a little less than 256 MiB", kib)
		}
		t.equal("CPUs", lines[3], "1")
	})
}

// Every line of a process that ends at once must arrive.
func TestE2EShortOutput(tt *testing.T) {
	once(tt, func(t *test) {
		r := t.run("seq", "1", "200000")
		lines := strings.Count(r.stdout, "\n")
		t.equal("lines", lines, 200000)
		t.equal("last line", lastLine(r.stdout), "200000")
		t.equal("exit code", r.code, 0)
	})
}

func TestE2EStdin(tt *testing.T) {
	each(tt, func(t *test) {
		input := strings.Repeat("0123456789abcde\n", 64<<10) // 1 MiB
		r := t.try(input, runArgs([]string{"--rm"}, t.id(""), "md5sum")...)
		want := t.try(input, runArgs([]string{"--rm"}, t.id(""), "cat")...)
		t.equal("exit code", r.code, 0)
		if want.stdout != input {
			t.Errorf("%d bytes came back of %d", len(want.stdout), len(input))
		}
	})
}

func TestE2EEnvironment(tt *testing.T) {
	once(tt, func(t *test) {
		r := t.try("", runArgs([]string{"--rm", "--env", "GREETING=hello world", "--cwd", "/tmp"}, t.id(""), "sh", "-c", "echo $GREETING; pwd")...)
		t.equal("stdout", r.stdout, "hello world\n/tmp\n")
	})
}

func TestE2ECommandNotFound(tt *testing.T) {
	once(tt, func(t *test) {
		r := t.run("/no/such/command")
		if r.code == 0 || !strings.Contains(r.stderr, "/no/such/command") {
			t.Errorf("exit code %d, stderr %q: want the command in an error", r.code, r.stderr)
		}
	})
}

func TestE2ELongID(tt *testing.T) {
	each(tt, func(t *test) {
		id := t.generation + strings.Repeat("x", 76-len(t.generation)) // containerd's limit
		t.ids = append(t.ids, id)
		r := t.try("", runArgs([]string{"--rm"}, id, "echo", "hello")...)
		t.equal("stdout", r.stdout, "hello\n")
	})
}

// Three containers at a time are three machines.
func TestE2EMany(tt *testing.T) {
	once(tt, func(t *test) {
		ids := []string{t.id("1"), t.id("2"), t.id("3")}
		for _, id := range ids {
			t.ctr(runArgs([]string{"--detach"}, id, "sleep", "1000")...)
		}
		boots := map[string]bool{}
		for _, id := range ids {
			boots[t.exec(id, "cat", "/proc/sys/kernel/random/boot_id")] = true
			t.equal("exec", t.exec(id, "echo", id), id+"\n")
		}
		if runtime == ours && len(boots) != len(ids) {
			t.Errorf("%d machines for %d containers", len(boots), len(ids))
		}
	})
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
