package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	rt "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/test/daemon"
	"github.com/vmshim/vmshim/test/ociimage"
)

// apart runs f where it can change networks and mounts of its own only, on a
// thread that ends with it: what f starts is there, too.
func apart(t *testing.T, f func(*testing.T)) {
	rt.LockOSThread()
	if unix.Gettid() == unix.Getpid() { // cannot end
		defer rt.UnlockOSThread()
		t.Run("apart", func(t *testing.T) { apart(t, f) })
		return
	}
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		t.Fatal(err)
	}
	f(t)
}

// A nerd is nerdctl, with a containerd of its own.
type nerd struct {
	*testing.T
	*daemon.Daemon
	local  *daemon.Local
	binary string
	dir    string
}

func newNerd(t *testing.T) *nerd {
	t.Helper()
	// Not below the test's name: sockets lie in it.
	dir, err := os.MkdirTemp("", "vmn") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	local, err := daemon.NewLocal(t.Context(), dir, "debug = true", fmt.Sprintf("timeouts.hook = '%v'", vmtest.Within(30*time.Second)))
	if err != nil {
		t.Fatal(err)
	}
	if err := local.Built(); err != nil {
		t.Fatal(err)
	}
	bin, err := local.Hack(t.Context(), "nerdctl")
	if err != nil {
		t.Fatal(err)
	}
	n := &nerd{T: t, local: local, binary: filepath.Join(bin, "nerdctl"), dir: dir}
	// What CNI plugins keep where everybody finds it.
	for _, shared := range []string{"/var/lib/cni", "/etc/cni"} {
		own := filepath.Join(dir, filepath.Base(shared))
		n.must(os.MkdirAll(own, 0o700))
		n.must(os.MkdirAll(shared, 0o755))
		n.must(unix.Mount(own, shared, "", unix.MS_BIND, ""))
	}
	n.loopback()
	if n.Daemon, err = local.Start(t.Context(), "2"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = n.try("rm", "-f", "web", "client", "bare", "broken")
		left, err := n.Leftovers(local.StateDir())
		for end := time.Now().Add(vmtest.Within(10 * time.Second)); len(left) > 0 && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			left, err = n.Leftovers(local.StateDir())
		}
		if err != nil || len(left) > 0 {
			t.Errorf("left on the host: %v\n%s", err, strings.Join(left, "\n"))
		}
		if t.Failed() {
			t.Logf("log of containerd:\n%s", n.Tail(80))
		}
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
		if !t.Failed() {
			_ = os.RemoveAll(dir)
		}
	})
	return n
}

func (n *nerd) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// loopback sets the loopback device of the namespace up.
func (n *nerd) loopback() {
	n.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	n.must(err)
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	n.must(err)
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	n.must(unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req))
}

// try runs nerdctl with a time limit.
func (n *nerd) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Within(2*time.Minute))
	defer cancel()
	cmd := n.command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("nerdctl %q: %w\n%s%s", args, err, &out, &errs)
	}
	return out.String(), err
}

func (n *nerd) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, n.binary, append([]string{
		"--address", n.Address(), "--namespace", "default", "--data-root", filepath.Join(n.dir, "nerdctl"),
		"--cni-path", "/usr/lib/cni", "--cni-netconfpath", filepath.Join(n.dir, "netconf"), "--cgroup-manager", "cgroupfs",
		"--hosts-dir", n.dir,
	}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+n.local.ShimDir()+":"+os.Getenv("PATH"), "NERDCTL_TOML=/dev/null", "VMSHIM_CONFIG="+n.local.ShimConfig())
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (n *nerd) do(args ...string) string {
	n.Helper()
	out, err := n.try(args...)
	n.must(err)
	return out
}

// stats is the first line of it with figures: without --no-stream, which waits a
// second for them and no longer.
func (n *nerd) stats(name string) (line string) {
	n.Helper()
	ctx, cancel := context.WithTimeout(n.Context(), vmtest.Within(15*time.Second))
	defer cancel()
	cmd := n.command(ctx, "stats", "--format", "{{.Name}} {{.MemUsage}} {{.PIDs}}", name)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	n.must(err)
	n.must(cmd.Start())
	defer func() {
		cancel()
		_ = cmd.Wait() // killed
		if strings.Contains(line, "0B / 0B") {
			n.Logf("nerdctl stats: %s", &errs)
		}
	}()
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if line = lines.Text(); strings.Contains(line, name) && !strings.Contains(line, "0B / 0B") {
			return line
		}
	}
	return line
}

// has asserts what a nerdctl command prints.
func (n *nerd) has(out string, want ...string) {
	n.Helper()
	for _, text := range want {
		if !strings.Contains(out, text) {
			n.Errorf("no %q in\n%s", text, out)
		}
	}
}

func (n *nerd) refused(words string, args ...string) {
	n.Helper()
	if out, err := n.try(args...); err == nil || !strings.Contains(err.Error(), words) {
		n.Errorf("nerdctl %q: %s, %v, want %q", args, out, err, words)
	}
}

// TestE2ENerdctl is a day of a user of nerdctl.
func TestE2ENerdctl(t *testing.T) {
	if testing.Short() {
		t.Skip("starts machines; not in short mode")
	}
	if runtime != ours {
		t.Skip("is about networks of machines")
	}
	apart(t, func(t *testing.T) { newNerd(t).day() })
}

func (n *nerd) day() {
	data := filepath.Join(n.dir, "data")
	n.must(os.Mkdir(data, 0o755))
	n.must(os.WriteFile(filepath.Join(data, "note"), []byte("from the host"), 0o644))
	run := func(flags ...string) []string { return append([]string{"run", "--runtime", runtime}, flags...) }

	n.do("network", "create", "--ipv6", "--subnet", "10.98.0.0/24", "--subnet", "fd98::/64", "six")
	n.do(run("-d", "--name", "web", "--net", "bridge", "--net", "six", "--hostname", "webhost", "-p", "127.0.0.1:18080:80", "--dns", "10.9.9.53", "--add-host", "db:10.9.9.9",
		"-v", data+":/data", "--tmpfs", "/scratch:size=1m", "--memory", "96m", "--cpus", "1",
		ociimage.Name, "sh", "-c", "echo serving; exec nc -ll -p 80 -e echo hello")...)

	logs := ""
	for end := time.Now().Add(15 * time.Second); logs == "" && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		logs = n.do("logs", "web")
	}
	n.has(logs, "serving")
	n.has(n.do("ps"), "web", "127.0.0.1:18080->80/tcp")
	ip := strings.TrimSpace(n.do("inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web"))
	n.has(n.do("inspect", "web"), `"Running": true`, `"webhost"`)
	guest := n.do("exec", "web", "sh", "-c", "ip addr; ip route; cat /etc/resolv.conf /etc/hosts /data/note; hostname; df /scratch; grep MemTotal /proc/meminfo")
	n.has(guest, "inet "+ip+"/", "default via", "nameserver 10.9.9.53", "10.9.9.9", "db", "from the host", "webhost", "1024", "/scratch")
	if got := n.get("127.0.0.1:18080"); got != "hello\n" {
		n.Errorf("published port: %q", got)
	}
	if got := n.get(ip + ":80"); got != "hello\n" {
		n.Errorf("container's address: %q", got)
	}

	// Files go both ways, and the host's own stay what they are.
	n.must(os.WriteFile(filepath.Join(n.dir, "in"), []byte("copied"), 0o600))
	n.do("cp", filepath.Join(n.dir, "in"), "web:/etc/vmshim-e2e")
	n.has(n.do("exec", "web", "cat", "/etc/vmshim-e2e"), "copied")
	if _, err := os.Lstat("/etc/vmshim-e2e"); err == nil {
		n.Error("cp wrote to the host")
	}
	n.do("exec", "web", "sh", "-c", "echo made inside > /root/out")
	n.do("cp", "web:/root/out", filepath.Join(n.dir, "out"))
	if text, err := os.ReadFile(filepath.Join(n.dir, "out")); err != nil || string(text) != "made inside\n" {
		n.Errorf("copied out: %q, %v", text, err)
	}

	n.has(n.stats("web"), "web", "MiB", "96MiB")
	n.do("pause", "web")
	n.has(n.do("inspect", "--format", "{{.State.Status}}", "web"), "paused")
	n.do("unpause", "web")
	if got := n.get("127.0.0.1:18080"); got != "hello\n" {
		n.Errorf("after the pause: %q", got)
	}
	n.processes()

	// Over another network, which has IPv6 too.
	n.has(n.do("exec", "web", "ip", "addr", "show", "eth1"), "inet 10.98.0.2/24", "inet6 fd98::2/64")
	client := "for a in web 10.98.0.2 fd98::2; do echo $(nc $a 80 </dev/null) from $a; ping -c 1 -W 10 $a; done; ping -c 1 -W 10 fd98::1; ip addr"
	got := n.do(run("--rm", "--name", "client", "--net", "six", ociimage.Name, "sh", "-c", client)...)
	n.has(got, "hello from web", "hello from 10.98.0.2", "hello from fd98::2", "inet6 fd98::3/64")
	if strings.Count(got, "1 packets received") != 4 {
		n.Errorf("lost packets: %s", got)
	}
	n.broken(run)
	if out := n.do(run("--rm", "--name", "bare", "--net", "none", ociimage.Name, "ip", "-o", "link")...); strings.Count(out, "\n") != 1 || !strings.Contains(out, "lo:") {
		n.Errorf("interfaces without a network: %s", out)
	}
	n.refused("cannot use the host's network", run("--rm", "--net", "host", ociimage.Name, "true")...)
	n.refused("cannot share it", run("--rm", "--net", "container:web", ociimage.Name, "true")...)

	n.do("rm", "-f", "web")
	n.has(n.do("ps", "-a", "--format", "names:{{.Names}}")+"none", "none")
	if got := n.do("ps", "-aq"); got != "" {
		n.Errorf("left: %s", got)
	}
	if conn, err := net.DialTimeout("tcp", "127.0.0.1:18080", time.Second); err == nil {
		conn.Close()
		n.Error("the port is still published")
	}
}

// broken has a network fail after it made an interface.
func (n *nerd) broken(run func(...string) []string) {
	n.Helper()
	leases := filepath.Join(n.dir, "leases")
	n.must(os.WriteFile(filepath.Join(n.dir, "netconf", "broken.conflist"), fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "broken", "plugins": [
		{"type": "bridge", "bridge": "br-broken", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.97.0.0/24"}]], "dataDir": %q}},
		{"type": "tuning", "sysctl": {"net.core.vmshim": "1"}}]}`, leases), 0o600))
	before, err := net.Interfaces()
	n.must(err)
	n.refused("net/core/vmshim", run("-d", "--name", "broken", "--net", "broken", ociimage.Name, "sleep", "1000")...)
	n.do("rm", "-f", "broken")
	if left, err := filepath.Glob(leases + "/broken/10.*"); err != nil || len(left) > 0 {
		n.Errorf("addresses left: %v, %v", left, err)
	}
	if left, err := filepath.Glob(n.local.StateDir() + "/*/state.json"); err != nil || len(left) != 1 {
		n.Errorf("sandboxes left beside web's: %v, %v", left, err)
	}
	after, err := net.Interfaces()
	n.must(err)
	for _, link := range after {
		if link.Name != "br-broken" && !slices.ContainsFunc(before, func(b net.Interface) bool { return b.Name == link.Name }) {
			n.Errorf("interface left: %s", link.Name)
		}
	}
}

// processes asks vmshim for what nerdctl's top cannot show.
func (n *nerd) processes() {
	n.Helper()
	id := strings.TrimSpace(n.do("inspect", "--format", "{{.ID}}", "web"))
	cmd := exec.CommandContext(n.Context(), filepath.Join(n.local.ShimDir(), "vmshim"), "ps", "--json", id)
	cmd.Env = append(os.Environ(), "VMSHIM_CONFIG="+n.local.ShimConfig())
	out, err := cmd.CombinedOutput()
	var list []struct {
		PID     int
		Command string
	}
	if err == nil {
		err = json.Unmarshal(out, &list)
	}
	if err != nil || len(list) != 1 || list[0].PID == 0 || !strings.HasPrefix(list[0].Command, "nc -ll -p 80") {
		n.Errorf("vmshim ps: %v: %s", err, out)
	}
}

// get reads what a port says.
func (n *nerd) get(address string) string {
	n.Helper()
	conn, err := net.DialTimeout("tcp", address, vmtest.Within(10*time.Second))
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(vmtest.Within(30 * time.Second)))
	text, err := io.ReadAll(conn)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
