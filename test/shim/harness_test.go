package shim

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/sandbox"
	"github.com/vmshim/vmshim/test/daemon"
)

// patience is for machines without KVM, on a busy host.
var patience = vmtest.Timeout

// A host is what a containerd would be: a directory for everything, and a
// receiver of events.
type host struct {
	testing.TB
	dir     string
	binary  string
	local   *daemon.Local
	sink    *sink
	sockets string
	ns      string // containerd's namespace
	all     []*tasks
}

// newHost is a host whose machines go on from templates.
func newHost(tb testing.TB, extra ...string) *host {
	tb.Helper()
	vmtest.Need(tb) // not in short mode
	dir, err := vmtest.Templates(func(dir string) error { return daemon.MakeTemplates(tb.Context(), dir) })
	if err != nil {
		tb.Fatal(err)
	}
	return newHostWith(tb, dir, extra...)
}

// newHostWith is a host with templates of its own, or none.
func newHostWith(tb testing.TB, templates string, extra ...string) *host {
	tb.Helper()
	vmtest.Need(tb) // not in short mode
	// Sockets lie in it, so its name is short.
	dir, err := os.MkdirTemp("", "s") //nolint:usetesting // see above
	if err != nil {
		tb.Fatal(err)
	}
	local, err := daemon.NewLocal(tb.Context(), dir, append(extra, "debug = true", daemon.TemplateDir(templates))...)
	if err != nil {
		tb.Fatal(err)
	}
	if err := local.Built(); err != nil {
		tb.Fatal(err)
	}
	h := &host{TB: tb, dir: dir, local: local, sockets: filepath.Join(dir, "k"), ns: "ns"}
	h.binary = os.Getenv("VMSHIM_TEST_SHIM")
	if h.binary == "" {
		h.binary = filepath.Join(local.ShimDir(), "containerd-shim-vm-v2")
	}
	h.sink = newSink(tb, filepath.Join(dir, "e.sock"))
	tb.Cleanup(func() {
		h.wantNothing()
		if tb.Failed() {
			h.sweep()
			tb.Logf("left for inspection: %s", dir)
		} else {
			_ = os.RemoveAll(dir)
		}
	})
	return h
}

// wantNothing asserts that nothing is left on the host: of processes, mounts,
// sockets, state.
func (h *host) wantNothing() {
	h.Helper()
	// Loggers and the like are reaped by whoever started them.
	for deadline := time.Now().Add(vmtest.Within(2 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
		left := h.leftovers()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			h.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			return
		}
	}
}

// sweep removes what a test that failed left.
func (h *host) sweep() {
	for _, pid := range h.pids() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for _, t := range h.all {
		_ = t.command(nil, "-bundle", t.bundle, "delete").Run()
	}
}

func (h *host) leftovers() (left []string) {
	for _, pid := range h.pids() {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		left = append(left, fmt.Sprintf("process %d %q", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, h.dir+"/") {
			left = append(left, "mount "+line)
		}
	}
	for _, dir := range []string{h.local.StateDir(), h.sockets} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.Name() == "probe.json" { // what is known of QEMU, for all sandboxes
				continue
			}
			left = append(left, "file "+filepath.Join(dir, e.Name()))
		}
	}
	return left
}

// pids are the processes that were started for this host: its directory is in
// the environment or the arguments.
func (h *host) pids() (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		environ, _ := os.ReadFile(filepath.Join(dir, "environ"))
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if pid != os.Getpid() && (bytes.Contains(environ, []byte(h.dir+"/")) || bytes.Contains(cmdline, []byte(h.dir+"/"))) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// find is the process whose command line has the text in it.
func (h *host) find(text string) int {
	h.Helper()
	pid := h.look(text)
	if pid == 0 {
		h.Fatalf("no process %q", text)
	}
	return pid
}

// look is find, and 0 when there is none.
func (h *host) look(text string) int {
	for _, pid := range h.pids() {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if bytes.Contains(cmdline, []byte(text)) {
			return pid
		}
	}
	return 0
}

// await is find for a process that is being started.
func (h *host) await(text string) (pid int) {
	h.Helper()
	h.until(fmt.Sprintf("process %q", text), func() bool {
		pid = h.look(text)
		return pid != 0
	})
	return pid
}

// awaitPhase waits until the only sandbox that starts has come that far.
func (h *host) awaitPhase(name string) {
	h.Helper()
	h.until(fmt.Sprintf("sandbox in phase %q", name), func() bool {
		dirs, _ := sandbox.Dirs(h.local.StateDir()) // it may not be there yet
		return slices.ContainsFunc(dirs, func(dir string) bool {
			st, _ := sandbox.ReadState(dir)
			return st != nil && slices.ContainsFunc(st.Timeline, func(p sandbox.Phase) bool { return p.Name == name })
		})
	})
}

// until waits for what comes by itself.
func (h *host) until(what string, there func() bool) {
	h.Helper()
	for deadline := time.Now().Add(patience); !there(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			h.Fatalf("no %s in time", what)
		}
	}
}

// kernelVsock says that no helper carries the streams.
func (h *host) kernelVsock() bool {
	_, err := os.Stat("/dev/vhost-vsock")
	return err == nil
}

func alive(pid int) bool {
	return unix.Kill(pid, 0) == nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}
