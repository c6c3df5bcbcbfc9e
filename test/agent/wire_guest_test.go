package agent_test

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/test/agent/plain"
)

const wireShare = "/run/kata-containers/shared/containers"

// A host that knows only the plain protocol, and a guest of this project.
func TestVMWireAgent(t *testing.T) {
	m := vmtest.Boot(t, func(s *hypervisor.Spec) {
		s.KernelParams = append(s.KernelParams, "agent.log=debug", "agent.log_vport=1025", "agent.devmode",
			"agent.server_addr=tcp://0.0.0.0:1", "agent.hotplug_timeout=soon", "agent.container_pipe_size=8192", "agent.cdh_api_timeout=50")
	})
	conn, err := m.Dial(vmtest.Context(t), 1024)
	if err != nil {
		t.Fatal(err)
	}
	h := wireHost{plain.NewClient(conn), t}
	defer h.Close()
	h.Metadata = map[string]string{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
	wireHealth(h)
	// hostname 1, storages 3 {driver 1, source 3, fstype 4, mount_point 6}, sandbox_id 5
	sandbox := plain.Msg{}.Str(1, "pod").Str(5, "pod").
		Sub(3, plain.Msg{}.Str(1, "virtio-fs").Str(3, "kataShared").Str(4, "virtiofs").Str(6, wireShare+"/"))
	h.must("CreateSandbox", sandbox)
	h.refused("a second sandbox", "CreateSandbox", sandbox, plain.AlreadyExists)

	g := wireGuest{h, m.Share}
	for _, part := range []struct {
		name string
		test func(wireGuest)
	}{
		{"streams", wireStreams},
		{"end of input", wireEndOfInput},
		{"terminal", wireTerminal},
		{"waiters", wireWaiters},
		{"signals", wireSignals},
		{"kill all", wireKillAll},
		{"retries", wireRetries},
		{"oom", wireOOM},
		{"copy file", func(g wireGuest) { wireCopyFile(g.wireHost, wireShare, g.share) }},
		{"details", wireDetails},
		{"pipe size", wirePipeSize},
		{"interfaces", func(g wireGuest) { wireInterfaces(g, m) }},
		{"log", func(g wireGuest) { wireLog(g, m) }},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(wireGuest{h.on(t), g.share}) })
	}
	h.must("DestroySandbox", nil)
	select {
	case <-m.Done():
	case <-time.After(vmtest.Timeout):
		t.Error("the machine goes on")
	}
}

// A wireGuest is the guest of a plain host.
type wireGuest struct {
	wireHost
	share string
}

// rootfs makes a root file system of busybox.
func (g wireGuest) rootfs(id string) {
	g.t.Helper()
	dir := filepath.Join(g.share, id, "rootfs")
	for _, d := range []string{"bin", "proc", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			g.t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "bin/busybox"), busybox, 0o755)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	for _, name := range []string{"sh", "cat", "sleep", "echo", "touch", "tail"} {
		_ = os.Symlink("busybox", filepath.Join(dir, "bin", name))
	}
}

func wireProcess(terminal bool, args ...string) plain.Msg {
	// terminal 1, user 3, args 4, env 5, cwd 6
	m := plain.Msg{}.Sub(3, plain.Msg{}).Str(4, args...).Str(5, "PATH=/bin").Str(6, "/")
	if terminal {
		m = m.Int(1, 1)
	}
	return m
}

// request is CreateContainer's: container_id 1, exec_id 2, OCI 6.
func (g wireGuest) request(id string, process plain.Msg, resources ...plain.Msg) plain.Msg {
	mount := func(to, kind string, options ...string) plain.Msg {
		return plain.Msg{}.Str(1, to).Str(2, kind).Str(3, kind).Str(4, options...)
	}
	linux := plain.Msg{}.Sub(4, resources...)
	for _, ns := range []string{"ipc", "uts", "mount", "pid"} {
		linux = linux.Sub(6, plain.Msg{}.Str(1, ns))
	}
	// version 1, process 2, root 3 {path 1}, mounts 5, linux 8
	spec := plain.Msg{}.Str(1, "1.0.2").Sub(2, process).Sub(3, plain.Msg{}.Str(1, wireShare+"/"+id+"/rootfs")).
		Sub(5, mount("/proc", "proc"), mount("/dev", "tmpfs", "mode=755"), mount("/dev/pts", "devpts", "newinstance", "ptmxmode=0666")).Sub(8, linux)
	return plain.Msg{}.Str(1, id).Str(2, id).Sub(6, spec)
}

// start makes a container with a process and lets it run.
func (g wireGuest) start(id string, args ...string) {
	g.t.Helper()
	g.rootfs(id)
	g.must("CreateContainer", g.request(id, wireProcess(false, args...)))
	g.must("StartContainer", plain.Msg{}.Str(1, id))
}

func (g wireGuest) remove(id string) {
	g.t.Helper()
	g.must("RemoveContainer", plain.Msg{}.Str(1, id).Int(2, 20))
}

// read polls one output to its end.
func (g wireGuest) read(method, id, exec string) string {
	g.t.Helper()
	var all strings.Builder
	for {
		data := g.must(method, plain.Msg{}.Str(1, id).Str(2, exec).Int(3, 32<<10)).Str(1)
		if data == "" {
			return all.String()
		}
		all.WriteString(data)
	}
}

func (g wireGuest) wait(id, exec string) uint64 {
	g.t.Helper()
	return g.must("WaitProcess", plain.Msg{}.Str(1, id).Str(2, exec)).Int(1)
}

func (g wireGuest) exists(id, file string) {
	g.t.Helper()
	for end := time.Now().Add(vmtest.Within(time.Minute)); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(g.share, id, "rootfs", file)); err == nil {
			return
		}
		if time.Now().After(end) {
			g.t.Fatalf("%s: no file %s", id, file)
		}
	}
}

func wireStreams(g wireGuest) {
	g.start("s", "/bin/sh", "-c", "cat; echo done >&2; exit 3")
	data := strings.Repeat("0123456789abcdef", 1<<15)
	var jobs sync.WaitGroup
	jobs.Go(func() {
		for rest := data; rest != ""; {
			n := g.must("WriteStdin", plain.Msg{}.Str(1, "s").Str(2, "s").Str(3, rest[:min(len(rest), 50000)])).Int(1)
			if n == 0 {
				g.t.Error("nothing was taken")
				return
			}
			rest = rest[n:]
		}
		g.must("CloseStdin", plain.Msg{}.Str(1, "s").Str(2, "s"))
	})
	if out := g.read("ReadStdout", "s", "s"); sha256.Sum256([]byte(out)) != sha256.Sum256([]byte(data)) {
		g.t.Errorf("stdout: %d bytes of %d", len(out), len(data))
	}
	if errs := g.read("ReadStderr", "s", "s"); errs != "done\n" {
		g.t.Errorf("stderr %q", errs)
	}
	jobs.Wait()
	if got := g.wait("s", "s"); got != 3 {
		g.t.Errorf("status %d", got)
	}
	g.remove("s")
}

func wireEndOfInput(g wireGuest) {
	g.start("eof", "/bin/cat")
	g.must("WriteStdin", plain.Msg{}.Str(1, "eof").Str(2, "eof").Str(3, "last words"))
	g.must("WriteStdin", plain.Msg{}.Str(1, "eof").Str(2, "eof"))
	if out := g.read("ReadStdout", "eof", "eof"); out != "last words" {
		g.t.Errorf("got %q", out)
	}
	if got := g.wait("eof", "eof"); got != 0 {
		g.t.Errorf("status %d", got)
	}
	g.remove("eof")
}

func wireTerminal(g wireGuest) {
	g.start("tty", "/bin/sleep", "1000")
	g.must("ExecProcess", plain.Msg{}.Str(1, "tty").Str(2, "x").Sub(4, wireProcess(true, "/bin/sh", "-c", "test -t 0 && test -t 2 && echo terminal >&2; cat")))
	g.must("TtyWinResize", plain.Msg{}.Str(1, "tty").Str(2, "x").Int(3, 24).Int(4, 80))
	if out := g.read("ReadStderr", "tty", "x"); out != "" {
		g.t.Errorf("stderr of a terminal: %q", out)
	}
	g.must("WriteStdin", plain.Msg{}.Str(1, "tty").Str(2, "x").Str(3, "\x04"))
	if out := g.read("ReadStdout", "tty", "x"); !strings.Contains(out, "terminal\r\n") {
		g.t.Errorf("stdout of a terminal: %q", out)
	}
	if got := g.wait("tty", "x"); got != 0 {
		g.t.Errorf("status %d", got)
	}
	g.must("SignalProcess", plain.Msg{}.Str(1, "tty").Int(3, 9))
	g.remove("tty")
}

func wireWaiters(g wireGuest) {
	g.start("w", "/bin/sh", "-c", "cat; exit 9") // ends with its input, when all wait
	type result struct {
		status uint64
		err    error
	}
	results := make(chan result, 5)
	for range cap(results) {
		go func() {
			answer, err := g.call("WaitProcess", plain.Msg{}.Str(1, "w").Str(2, "w"))
			results <- result{answer.Int(1), err}
		}()
	}
	select {
	case r := <-results:
		g.t.Errorf("a wait did not wait: %+v", r)
	case <-time.After(time.Second): // they are on their way, on the connection that the next call uses
	}
	g.must("CloseStdin", plain.Msg{}.Str(1, "w").Str(2, "w"))
	for range cap(results) {
		if r := <-results; r.err != nil || r.status != 9 {
			g.t.Errorf("got %+v", r)
		}
	}
	g.refused("wait afterwards", "WaitProcess", plain.Msg{}.Str(1, "w").Str(2, "w"), plain.NotFound)
	g.refused("signal afterwards", "SignalProcess", plain.Msg{}.Str(1, "w").Str(2, "w").Int(3, 15), plain.NotFound)
	g.remove("w")
}

func wireSignals(g wireGuest) {
	g.start("deaf", "/bin/sh", "-c", "touch /ready; exec sleep 1000")
	g.exists("deaf", "ready")
	g.must("SignalProcess", plain.Msg{}.Str(1, "deaf").Str(2, "deaf").Int(3, 15))
	if got := g.wait("deaf", "deaf"); got != 137 {
		g.t.Errorf("SIGTERM to a first process without a handler: status %d, want 137", got)
	}
	g.remove("deaf")
	g.start("hears", "/bin/sh", "-c", "trap 'exit 5' TERM; touch /ready; while :; do sleep 0.1; done")
	g.exists("hears", "ready")
	g.must("SignalProcess", plain.Msg{}.Str(1, "hears").Str(2, "hears").Int(3, 15))
	if got := g.wait("hears", "hears"); got != 5 {
		g.t.Errorf("SIGTERM to a handler: status %d, want 5", got)
	}
	g.remove("hears")
}

func wireKillAll(g wireGuest) {
	g.start("all", "/bin/sleep", "1000")
	g.must("ExecProcess", plain.Msg{}.Str(1, "all").Str(2, "e").Sub(4, wireProcess(false, "/bin/sleep", "1000")))
	g.must("SignalProcess", plain.Msg{}.Str(1, "all").Int(3, 9))
	if a, b := g.wait("all", "all"), g.wait("all", "e"); a != 137 || b != 137 {
		g.t.Errorf("status %d and %d", a, b)
	}
	g.remove("all")
}

// What a host sends again because it does not know whether it arrived.
func wireRetries(g wireGuest) {
	g.rootfs("again")
	create := g.request("again", wireProcess(false, "/bin/sleep", "1000"))
	g.must("CreateContainer", create)
	g.refused("create", "CreateContainer", create, plain.AlreadyExists)
	g.must("StartContainer", plain.Msg{}.Str(1, "again"))
	g.refused("start", "StartContainer", plain.Msg{}.Str(1, "again"), plain.FailedPrecondition)
	exec := plain.Msg{}.Str(1, "again").Str(2, "e").Sub(4, wireProcess(false, "/bin/sleep", "1000"))
	g.must("ExecProcess", exec)
	g.refused("exec", "ExecProcess", exec, plain.AlreadyExists)
	for _, method := range []string{"PauseContainer", "ResumeContainer"} {
		g.must(method, plain.Msg{}.Str(1, "again"))
		g.refused(method, method, plain.Msg{}.Str(1, "again"), plain.FailedPrecondition)
	}
	for range 2 {
		g.must("SignalProcess", plain.Msg{}.Str(1, "again").Int(3, 9))
		g.must("CloseStdin", plain.Msg{}.Str(1, "again").Str(2, "again"))
	}
	g.remove("again")
	g.refused("remove", "RemoveContainer", plain.Msg{}.Str(1, "again"), plain.NotFound)
	g.must("CreateContainer", create) // the id is free again
	g.remove("again")
}

func wireOOM(g wireGuest) {
	event := make(chan plain.Fields, 1)
	go func() {
		answer, err := g.call("GetOOMEvent", nil)
		if err != nil {
			g.t.Error(err)
		}
		event <- answer
	}()
	g.rootfs("oom")
	// resources 4 {memory 2 {limit 1, swap 3}}
	limit := plain.Msg{}.Sub(2, plain.Msg{}.Int(1, 16<<20).Int(3, 16<<20))
	g.must("CreateContainer", g.request("oom", wireProcess(false, "/bin/tail", "/dev/zero"), limit))
	g.must("StartContainer", plain.Msg{}.Str(1, "oom"))
	select {
	case answer := <-event:
		if answer.Str(1) != "oom" {
			g.t.Errorf("event of %q", answer.Str(1))
		}
	case <-time.After(vmtest.Within(time.Minute)):
		g.t.Fatal("no event")
	}
	if got := g.wait("oom", "oom"); got != 137 {
		g.t.Errorf("status %d", got)
	}
	g.remove("oom")
}

func wireDetails(g wireGuest) {
	details := g.must("GetGuestDetails", plain.Msg{}.Int(1, 1).Int(2, 1)).Sub(2)
	if details.Str(1) == "" || details.Int(2) != 1 || !strings.Contains(fmt.Sprint(details.Strs(4)), "virtio-fs") {
		g.t.Errorf("details %v", details)
	}
	metrics := g.must("GetMetrics", nil).Str(1)
	if !strings.Contains(metrics, "kata_guest_") {
		g.t.Errorf("metrics %.200q", metrics)
	}
}

// agent.container_pipe_size: so much can be written that nobody reads.
func wirePipeSize(g wireGuest) {
	g.start("pipe", "/bin/sh", "-c", "trap 'exit 0' PIPE; i=0; while :; do echo 0123456789abcde; i=$((i+1)); echo $i >/written; done")
	// 8 KiB in the pipe, and what the agent takes beforehand.
	last := ""
	for end, same := time.Now().Add(vmtest.Within(time.Minute)), 0; same < 10 && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		b, _ := os.ReadFile(filepath.Join(g.share, "pipe", "rootfs/written"))
		if now := string(b); now != "" && now == last {
			same++
		} else {
			last, same = now, 0
		}
	}
	if n, _ := strconv.Atoi(strings.TrimSpace(last)); n != 8192/16 {
		g.t.Errorf("%d bytes were written, want 8192", 16*n)
	}
	g.must("SignalProcess", plain.Msg{}.Str(1, "pipe").Int(3, 9))
	g.remove("pipe")
}

// Interfaces are found by their MAC, the way a plain host names them.
func wireInterfaces(g wireGuest, m *vmtest.Machine) {
	const mac = "02:00:00:00:97:02"
	if _, err := m.PlugNIC(vmtest.Context(g.t), hypervisor.NIC{ID: "wire", MAC: mac}, wireTaps(g.t), nil); err != nil {
		g.t.Fatal(err)
	}
	// name 2, IPAddresses 3 {family 1, address 2, mask 3}, mtu 4, hwAddr 5
	iface := func(name, mac string) plain.Msg {
		return plain.Msg{}.Sub(1, plain.Msg{}.Str(2, name).Sub(3, plain.Msg{}.Str(2, "10.97.0.2").Str(3, "24")).Int(4, 1400).Str(5, mac))
	}
	for range 2 { // the second time a host that does not know whether it arrived
		if got := g.must("UpdateInterface", iface("wire0", mac)); got.Str(5) != mac || got.Int(4) != 1400 {
			g.t.Errorf("updated to %v", got)
		}
	}
	var listed []string
	for _, i := range g.must("ListInterfaces", nil).Subs(1) {
		for _, addr := range i.Subs(3) {
			listed = append(listed, fmt.Sprintf("%s %s %d %s/%s", i.Str(2), i.Str(5), i.Int(4), addr.Str(2), addr.Str(3)))
		}
	}
	if !slices.Contains(listed, "wire0 "+mac+" 1400 10.97.0.2/24") {
		g.t.Errorf("listed are %q", listed)
	}
	g.refused("a card that is not there", "UpdateInterface", iface("wire9", "02:00:00:00:97:99"), plain.NotFound)
	g.start("net", "/bin/cat", "/proc/net/dev")
	if out := g.read("ReadStdout", "net", "net"); !strings.Contains(out, "wire0:") {
		g.t.Errorf("a container sees %q", out)
	}
	g.wait("net", "net")
	g.remove("net")
}

// wireTaps is the other end of a card, in a network namespace of its own.
func wireTaps(t *testing.T) []*os.File {
	t.Helper()
	link := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: "wire0"}, Mode: netlink.TUNTAP_MODE_TAP, NonPersist: true,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Queues: 1,
	}
	err := thread.Run(func() error { // the namespace is the thread's
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return netlink.LinkAdd(link)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range link.Fds {
			f.Close()
		}
	})
	return link.Fds
}

// agent.log_vport: the host connects and reads.
func wireLog(g wireGuest, m *vmtest.Machine) {
	conn, err := m.Dial(vmtest.Context(g.t), 1025)
	if err != nil {
		g.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(vmtest.Within(time.Minute)))
	g.refused("a request to be found in the log", "StatsContainer", plain.Msg{}.Str(1, "marked"), plain.NotFound)
	left := []string{
		"agent.server_addr", "not a number", "agent.cdh_api_timeout", // what was wrong with the parameters
		`container \"marked\"`, // debug, which the parameters ask for
	}
	var all strings.Builder
	for lines := bufio.NewScanner(conn); len(left) > 0 && lines.Scan(); {
		all.WriteString(lines.Text() + "\n")
		left = slices.DeleteFunc(left, func(s string) bool { return strings.Contains(lines.Text(), s) })
	}
	if len(left) > 0 {
		g.t.Errorf("the log lacks %q:\n%s", left, all.String())
	}
}
