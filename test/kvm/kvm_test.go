package kvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/sandbox"
	"github.com/vmshim/vmshim/test/daemon"
	"github.com/vmshim/vmshim/test/ociimage"
)

const runtime = "io.containerd.vm.v2"

// patience is for machines on a host that is emulated itself, on a busy machine.
const patience = 4 * time.Minute

func TestMain(m *testing.M) { vmtest.Main(m) }

// A host is a containerd with the shim, and the shim's configuration.
type host struct {
	*testing.T
	*daemon.Daemon
	local *daemon.Local
}

// start makes one. Everything that containers leave is an error.
func start(t *testing.T, extra ...string) *host {
	t.Helper()
	vmtest.Need(t, vmtest.Root, vmtest.KVM)
	dir, err := os.MkdirTemp("", "vmkvm") //nolint:usetesting // sockets lie in it: its name is short
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t, time.Minute)
	h := &host{T: t}
	if h.local, err = daemon.NewLocal(ctx, dir); err != nil {
		t.Fatal(err)
	}
	if err := h.local.Built(); err != nil {
		t.Fatal(err)
	}
	cfg := h.local.Config("debug = true", "timeouts.start = '1h'", "timeouts.request = '1h'",
		"template_dir = '"+filepath.Join(dir, "templates")+"'") + strings.Join(extra, "\n")
	if err := os.WriteFile(h.local.ShimConfig(), []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	if h.Daemon, err = h.local.Start(ctx, "debian"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of containerd:\n%s", h.Tail(60))
		}
		if err := h.Stop(); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return h
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// ctr runs containerd's client and returns all it says.
func (h *host) ctr(args ...string) (string, error) {
	out, err := h.Ctr(within(h.T, patience), args...).CombinedOutput()
	return string(out), err
}

// run starts a container in the background. It is gone, without a trace, when
// the test ends.
func (h *host) run(id string, flags ...string) {
	h.Helper()
	args := append([]string{"run", "--detach", "--runtime", runtime}, flags...)
	if out, err := h.ctr(append(args, ociimage.Name, id, "sleep", "100000")...); err != nil {
		h.Fatalf("run: %v: %s", err, out)
	}
	h.Cleanup(func() {
		_, _ = h.ctr("task", "delete", "--force", id)
		_, _ = h.ctr("container", "delete", id)
		h.eventually("nothing is left", func() string {
			left, err := h.Leftovers(h.local.StateDir(), id)
			if err != nil {
				return err.Error()
			}
			return strings.Join(left, "\n")
		})
	})
}

// eventually waits until nothing is amiss.
func (h *host) eventually(what string, amiss func() string) {
	h.Helper()
	text := amiss()
	for end := time.Now().Add(time.Minute); text != "" && time.Now().Before(end); text = amiss() {
		time.Sleep(50 * time.Millisecond)
	}
	if text != "" {
		h.Errorf("not in time: %s: %s", what, text)
	}
}

// state is the only sandbox'.
func (h *host) state() *sandbox.State {
	h.Helper()
	dirs, err := filepath.Glob(filepath.Join(h.local.StateDir(), strings.Repeat("?", 16)))
	if err != nil || len(dirs) != 1 {
		h.Fatalf("sandboxes %q, %v", dirs, err)
	}
	st, err := sandbox.ReadState(dirs[0])
	if err != nil {
		h.Fatal(err)
	}
	return st
}

// processes are the shim's and the machine's, and what those started.
func (h *host) processes(st *sandbox.State) map[int]string {
	all := map[int]string{st.Shim.PID: "shim"}
	for _, c := range st.Containers {
		all[c.Task.PID] = "task"
	}
	for _, p := range st.Processes {
		all[p.PID] = p.Role
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.PID, p.PID))
		for field := range strings.FieldsSeq(string(children)) {
			if pid, err := strconv.Atoi(field); err == nil {
				all[pid] = p.Role + "'s child"
			}
		}
	}
	return all
}

// check runs 'vmshim check'.
func (h *host) check() (ok bool, found map[string]string) {
	h.Helper()
	cmd := exec.CommandContext(within(h.T, time.Minute), filepath.Join(h.local.ShimDir(), "vmshim"), "check", "--json")
	cmd.Env = append(os.Environ(), "VMSHIM_CONFIG="+h.local.ShimConfig(), "PATH="+h.local.ShimDir()+":"+os.Getenv("PATH"))
	out, err := cmd.Output()
	var answer struct {
		OK     bool
		Checks []struct{ Name, Status, Detail string }
	}
	if jerr := json.Unmarshal(out, &answer); jerr != nil {
		h.Fatalf("check: %v, %v: %s", jerr, err, out)
	}
	if answer.OK != (err == nil) {
		h.Errorf("check: %v, and says that all is well: %t", err, answer.OK)
	}
	found = map[string]string{}
	for _, c := range answer.Checks {
		found[c.Name] += c.Status + ": " + c.Detail
	}
	return answer.OK, found
}

// TestKVMContainer runs one as users do, and looks where its processes are.
func TestKVMContainer(t *testing.T) {
	h := start(t)
	ok, found := h.check()
	for name, want := range map[string]string{"accelerator": "ok: kvm", "vsock": "ok: the kernel's", "cgroups": "ok: version 2"} {
		if !ok || found[name] != want {
			t.Errorf("check: %s is %q, want %q", name, found[name], want)
		}
	}
	if found["machine"] != "" {
		t.Errorf("check warns: %s", found["machine"])
	}

	const id, group = "kvm-container", "/vmshim.slice/kvm-container"
	h.run(id, "--cgroup", group, "--memory-limit", strconv.Itoa(64<<20))
	if out, err := h.ctr("task", "exec", "--exec-id", "e", id, "cat", "/proc/cpuinfo"); err != nil || !strings.Contains(out, "hypervisor") {
		t.Errorf("exec: %v: %s", err, out)
	}
	st := h.state()
	if !strings.HasPrefix(st.Agent, "vsock://") {
		t.Errorf("agent at %s", st.Agent)
	}
	roles := map[string]bool{}
	for pid, role := range h.processes(st) {
		roles[role] = true
		at, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if got := strings.TrimSpace(string(at)); err != nil || got != "0::"+group {
			t.Errorf("%s is in control group %q, %v", role, got, err)
		}
	}
	if !roles["qemu"] || !roles["virtiofsd"] || !roles["shim"] || !roles["task"] || roles["vhost-device-vsock"] {
		t.Errorf("processes: %v", roles)
	}
	dir := "/sys/fs/cgroup" + group
	number := func(name string) int {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, name))
		n, nerr := strconv.Atoi(strings.TrimSpace(string(text)))
		if err := errors.Join(err, nerr); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if got := number("memory.max"); got < st.MemoryMiB<<20 {
		t.Errorf("group may have %d bytes for a machine of %d MiB", got, st.MemoryMiB)
	}
	if got := number("memory.current"); got < 32<<20 || got > number("memory.max") {
		t.Errorf("group uses %d bytes", got)
	}
	h.bite(id, dir)
}

// bite takes memory from the group until the guest can't have what it was
// promised: the machine ends, the container is reported killed, and nothing is
// left.
func (h *host) bite(id, dir string) {
	h.Helper()
	limit := 8 << 20 // above what can't be given back
	stat, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
	if err != nil {
		h.Fatal(err)
	}
	for line := range strings.Lines(string(stat)) {
		var name string
		var bytes int
		if _, err := fmt.Sscan(line, &name, &bytes); err == nil && (name == "anon" || name == "shmem" || name == "kernel") {
			limit += bytes
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "memory.max"), []byte(strconv.Itoa(limit)), 0); err != nil {
		h.Fatal(err)
	}
	// In the guest the limit of the container is 64 MiB, which this obeys.
	out, err := h.ctr("task", "exec", "--exec-id", "big", id, "dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=48")
	if err == nil {
		h.Errorf("a machine got more than its control group may have: %s", out)
	}
	h.eventually("the task is stopped", func() string {
		out, err := h.ctr("task", "ls")
		if err == nil && strings.Contains(out, id) && strings.Contains(out, "STOPPED") {
			return ""
		}
		return fmt.Sprint(out, err)
	})
	events, err := os.ReadFile(filepath.Join(dir, "memory.events"))
	if err == nil && !bytes.Contains(events, []byte("oom_kill ")) || bytes.Contains(events, []byte("oom_kill 0\n")) {
		h.Errorf("events of the group: %s, %v", events, err)
	}
}

// TestKVMRefused takes the right to KVM away.
func TestKVMRefused(t *testing.T) {
	vmtest.Need(t, vmtest.Root, vmtest.KVM)
	hide(t, "/dev/kvm")
	const reason = "/dev/kvm is for root only"

	cfg := vmtest.Config()
	found, err := qemu.Probe(t.Context(), cfg)
	if err != nil || found.Accelerator != qemu.TCG || !strings.Contains(strings.Join(found.Warnings, "; "), reason) {
		t.Errorf("probe: %+v, %v", found, err)
	}
	cfg.Accelerator = qemu.KVM
	_, err = qemu.Probe(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), reason) || strings.Contains(err.Error(), "firmware") {
		t.Errorf("probe: %v", err)
	}
}

// TestKVMRefusedToContainers has a configuration that does not permit
// emulation.
func TestKVMRefusedToContainers(t *testing.T) {
	h := start(t, "[qemu]", "accelerator = 'kvm'")
	hide(t, "/dev/kvm")
	if ok, found := h.check(); ok || !strings.Contains(found["machine"], "/dev/kvm is for root only") {
		t.Errorf("check: %t, %v", ok, found)
	}
	const id = "kvm-refused"
	out, err := h.ctr("run", "--rm", "--runtime", runtime, ociimage.Name, id, "true")
	if err == nil || !strings.Contains(out, "/dev/kvm is for root only") {
		t.Errorf("run: %v: %s", err, out)
	}
	_, _ = h.ctr("container", "delete", id)
	if left, err := h.Leftovers(h.local.StateDir(), id); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// hide makes a device root's own until the test ends.
func hide(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	stat := info.Sys().(*syscall.Stat_t)
	t.Cleanup(func() {
		if err := errors.Join(os.Chown(path, int(stat.Uid), int(stat.Gid)), os.Chmod(path, info.Mode().Perm())); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(os.Chown(path, 0, 0), os.Chmod(path, 0o600)); err != nil {
		t.Fatal(err)
	}
}
