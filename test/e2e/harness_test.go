// Package e2e runs containers in machines through containerd's own client and
// a containerd of each generation. The tests say what any runtime has to do:
// VMSHIM_TEST_RUNTIME=io.containerd.runc.v2 runs them with runc, except those
// about the machine.
package e2e

import (
	"bytes"
	"context"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/test/daemon"
	"github.com/vmshim/vmshim/test/ociimage"
)

const ours = "io.containerd.vm.v2"

var (
	runtime = env("VMSHIM_TEST_RUNTIME", ours)
	// Which containerds; see daemon.Generations.
	generations = strings.Fields(env("VMSHIM_TEST_CONTAINERD", strings.Join(daemon.Generations, " ")))
)

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// A host is a daemon and what belongs to it; one for each generation, shared
// by all tests.
type host struct {
	*daemon.Daemon
	local      *daemon.Local
	generation string
	busy       sync.Mutex // held by the one test that uses it
}

var hosts = map[string]func() (*host, error){}

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var (
			mu      sync.Mutex
			started []*host // guarded by mu
		)
		for _, generation := range generations {
			hosts[generation] = sync.OnceValues(func() (*host, error) {
				h, err := start(generation)
				if err == nil {
					mu.Lock()
					defer mu.Unlock()
					started = append(started, h)
				}
				return h, err
			})
		}
		code := vmtest.Run(m)
		for _, h := range started {
			if err := h.Stop(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				code = 1
			}
			if code == 0 {
				_ = os.RemoveAll(h.local.Dir)
			} else {
				fmt.Fprintf(os.Stderr, "containerd %s: log and state are in %s\n", h.Version, h.local.Dir)
			}
		}
		return code
	}())
}

func start(generation string) (*host, error) {
	dir, err := os.MkdirTemp("", "vme2e")
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	var templates string
	if runtime == ours {
		if templates, err = vmtest.Templates(func(dir string) error { return daemon.MakeTemplates(ctx, dir) }); err != nil {
			return nil, err
		}
	}
	local, err := daemon.NewLocal(ctx, dir, "debug = true", daemon.TemplateDir(templates), "annotations = ['io.vmshim.vcpus', 'io.vmshim.kernel_params']")
	if err != nil {
		return nil, err
	}
	if runtime == ours {
		if err := local.Built(); err != nil {
			return nil, err
		}
	}
	d, err := local.Start(ctx, generation)
	return &host{Daemon: d, local: local, generation: generation}, err
}

// A test is one test under one containerd.
type test struct {
	*testing.T
	*host
	ids []string
}

// each runs f under every generation: what depends on what the daemon does.
func each(t *testing.T, f func(t *test)) { under(t, generations, f) }

// once runs f under one generation, always the same: what depends on the shim
// alone. VMSHIM_TEST_ALL runs it under every one.
func once(t *testing.T, f func(t *test)) {
	if os.Getenv("VMSHIM_TEST_ALL") != "" {
		each(t, f)
		return
	}
	t.Parallel()
	sum := crc32.ChecksumIEEE([]byte(t.Name()))
	under(t, []string{generations[int(sum)%len(generations)]}, f)
}

// under runs f under some generations. What f's containers leave is an error.
func under(t *testing.T, generations []string, f func(t *test)) {
	if testing.Short() {
		t.Skip("starts machines; not in short mode")
	}
	for _, generation := range generations {
		t.Run(generation, func(t *testing.T) {
			t.Parallel() // each has a daemon of its own
			h, err := hosts[generation]()
			if err != nil {
				t.Fatal(err)
			}
			h.busy.Lock() // what is left behind is looked for on all of a daemon
			t.Cleanup(h.busy.Unlock)
			tt := &test{T: t, host: h}
			t.Cleanup(tt.clean)
			f(tt)
		})
	}
}

func needMachine(t *test) {
	t.Helper()
	if runtime != ours {
		t.Skipf("is about the machine, which %s has not", runtime)
	}
}

// id names a container, which clean removes. It is of this daemon and of this
// run: ids name control groups, and with runc more than that, for all daemons.
func (t *test) id(suffix string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(t.Name(), "TestE2E"), "/")
	id := fmt.Sprintf("%s%s-%s-%d", strings.ToLower(name), suffix, t.generation, os.Getpid())
	t.ids = append(t.ids, id)
	return id
}

// clean removes the test's containers, and asserts that nothing is left.
func (t *test) clean() {
	if t.Failed() {
		t.Logf("log of containerd %s:\n%s", t.Version, t.Tail(60))
	}
	ctx := context.Background() // the test's own has ended
	for _, id := range t.ids {
		_ = t.Ctr(ctx, "task", "kill", "-s", "SIGKILL", id).Run()
		_ = t.Ctr(ctx, "task", "delete", "--force", id).Run()
		_ = t.Ctr(ctx, "container", "delete", id).Run()
	}
	var left []string
	for end := time.Now().Add(vmtest.Within(10 * time.Second)); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var err error
		if left, err = t.Leftovers(t.local.StateDir(), t.ids...); err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			return
		}
	}
	t.Errorf("left on the host:\n%s", strings.Join(left, "\n"))
}

// A result is how a command ended.
type result struct {
	stdout, stderr string
	code           int
}

// try runs ctr with a time limit.
func (t *test) try(stdin string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), vmtest.Timeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := t.Ctr(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if _, exited := err.(*exec.ExitError); err != nil && !exited || ctx.Err() != nil { //nolint:errorlint // Run's own
		t.Fatalf("ctr %q: %v %v\n%s%s", args, err, ctx.Err(), stdout.String(), stderr.String())
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// ctr runs ctr, which has to succeed, and returns its output.
func (t *test) ctr(args ...string) string {
	t.Helper()
	r := t.try("", args...)
	if r.code != 0 {
		t.Fatalf("ctr %q: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// runArgs are the arguments of 'ctr run' for a container.
func runArgs(flags []string, id string, command ...string) []string {
	args := append([]string{"run", "--runtime", runtime}, flags...)
	return append(append(args, ociimage.Name, id), command...)
}

// run runs a container in the foreground and removes it.
func (t *test) run(command ...string) result {
	t.Helper()
	return t.try("", runArgs([]string{"--rm"}, t.id(""), command...)...)
}

// spawn runs a container in the background.
func (t *test) spawn(flags []string, command ...string) (id string) {
	t.Helper()
	id = t.id("")
	t.ctr(runArgs(append([]string{"--detach"}, flags...), id, command...)...)
	return id
}

// exec runs a process in a container.
func (t *test) exec(id string, command ...string) string {
	t.Helper()
	return t.ctr(append([]string{"task", "exec", "--exec-id", execID(), id}, command...)...)
}

var execs atomic.Int64

func execID() string { return fmt.Sprintf("e%d", execs.Add(1)) }

var exitCode = regexp.MustCompile(`non-zero exit code (\d+)`)

// deleteTask deletes a task that has ended and returns its exit code. ctr 2.x
// says it, those before end with it.
func (t *test) deleteTask(id string) int {
	t.Helper()
	r := t.try("", "task", "delete", id)
	if m := exitCode.FindStringSubmatch(r.stderr); m != nil {
		r.code, _ = strconv.Atoi(m[1])
	}
	return r.code
}

// status is the task's, as 'ctr task ls' says it.
func (t *test) status(id string) string {
	t.Helper()
	for line := range strings.Lines(t.ctr("task", "ls")) {
		if f := strings.Fields(line); len(f) >= 3 && f[0] == id {
			return f[2]
		}
	}
	return "no task"
}

// pid is the task's.
func (t *test) pid(id string) (pid int) {
	t.Helper()
	for line := range strings.Lines(t.ctr("task", "ls")) {
		if f := strings.Fields(line); len(f) >= 3 && f[0] == id {
			if _, err := fmt.Sscan(f[1], &pid); err != nil {
				t.Fatal(err)
			}
		}
	}
	return pid
}

// eventually waits for a state that is reached soon.
func (t *test) eventually(what string, ok func() bool) {
	t.Helper()
	limit := vmtest.Within(15 * time.Second)
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within %v: %s", limit, what)
}

func (t *test) equal(what string, got, want any) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %#v, want %#v", what, got, want)
	}
}
