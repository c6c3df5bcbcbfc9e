package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

const (
	shareDir     = "/run/kata-containers/shared/containers"
	sandboxDir   = "/run/kata-containers/sandbox"
	groupDir     = "/sys/fs/cgroup/vmshim"
	observerPort = 7001
	guestMiB     = 256
	mib          = 1 << 20
)

// A guest is a machine with a sandbox and an observer in it.
type guest struct {
	*vmtest.Machine
	client *agent.Client
	agent  string // the process of the agent in the guest's /proc
	cpus   int    // that it has

	snapshot string // file of a guest to clone; made when first wanted
}

// bootGuest starts a machine with a client of its agent, and no sandbox yet.
func bootGuest(t *testing.T, change ...func(*hypervisor.Spec)) *guest {
	t.Helper()
	m := vmtest.Boot(t, append([]func(*hypervisor.Spec){func(s *hypervisor.Spec) {
		s.MaxVCPUs, s.MemoryMiB, s.MaxMemoryMiB = 3, guestMiB, 4*guestMiB
		shared(t, s.Shares[0].Dir)
	}}, change...)...)
	g := &guest{Machine: m, cpus: 1, client: agent.New(agent.Settings{Dial: m.Dial, URL: m.AgentURL(extension.AgentPort)})}
	t.Cleanup(func() { g.client.MarkDead(errors.New("test is over")) })
	return g
}

// shared makes a directory a mount that virtiofsd sees later mounts in.
func shared(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
}

// startGuest starts one with a plain sandbox and the observer.
func startGuest(t *testing.T, change ...func(*hypervisor.Spec)) *guest {
	t.Helper()
	g := bootGuest(t, change...)
	if err := g.client.StartSandbox(vmtest.Context(t), agent.Sandbox{Request: plainSandbox()}); err != nil {
		t.Fatal(err)
	}
	g.observe(t)
	return g
}

// plainSandbox is a sandbox with the share.
func plainSandbox() *protocol.CreateSandboxRequest {
	return &protocol.CreateSandboxRequest{
		Hostname: "plain", SandboxId: "rows",
		Storages: []*protocol.Storage{{Driver: "virtio-fs", Source: "kataShared", Fstype: "virtiofs", MountPoint: shareDir}},
	}
}

// observe starts the observer, in a container that may do everything. It stays.
func (g *guest) observe(t *testing.T) {
	t.Helper()
	ctx, id := vmtest.Context(t), "observer"
	root := g.rootfs(t, id)
	copyFile(t, observer(t), filepath.Join(root, "bin", "observer"))
	if g.VM == nil { // a clone, which has no share
		if err := g.client.CopyFile(ctx, filepath.Dir(root), shareDir+"/"+id); err != nil {
			t.Fatal(err)
		}
	}
	req := container(id, "/bin/observer", strconv.Itoa(observerPort))
	req.OCI.Mounts = append(req.OCI.Mounts, &protocol.Mount{Destination: "/guest/proc", Source: "/proc", Type: "bind", Options: []string{"rbind"}})
	req.OCI.Process.Capabilities = everything()
	req.OCI.Linux.Resources.Devices = []*protocol.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	err := g.client.CreateContainer(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	streams, err := g.client.Streams(ctx, id, "", agent.StreamSet{Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	defer streams.Close()
	if err := g.client.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(streams.Stdout, make([]byte, len("listening\n"))); err != nil {
		why, _ := io.ReadAll(streams.Stderr)
		t.Fatalf("observer: %v: %s", err, why)
	}
	out, err := g.look(ctx, `grep -l '^vmshim-agent.agent' /proc/[0-9]*/cmdline`)
	if err != nil {
		t.Fatal(err)
	}
	g.agent = filepath.Dir(strings.TrimSpace(out))
}

// builtObserver is the program.
var builtObserver = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "observer")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "observer")
	cmd := exec.Command("go", "build", "-o", path, "./observer")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build observer: %w: %s", err, out)
	}
	return os.ReadFile(path)
})

func observer(t *testing.T) []byte {
	t.Helper()
	b, err := builtObserver()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// An observation is what a script in the guest said.
type observation struct {
	Output string    `json:"output"`
	Status int       `json:"status"`
	Time   time.Time `json:"time"` // the guest's clock when the script came

	sent, back time.Time // the host's
}

// ask has the observer run a script.
func (g *guest) ask(ctx context.Context, script string) (o observation, err error) {
	o.sent = time.Now()
	conn, err := g.Dial(ctx, observerPort)
	if err != nil {
		return o, fmt.Errorf("ask observer: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if err := json.NewEncoder(conn).Encode(map[string]string{"script": script}); err != nil {
		return o, fmt.Errorf("ask observer: %w", err)
	}
	if err := json.NewDecoder(conn).Decode(&o); err != nil {
		return o, fmt.Errorf("ask observer: %w", err)
	}
	o.back = time.Now()
	return o, nil
}

// answers says whether the guest can be reached at all.
func (g *guest) answers() bool {
	ctx, cancel := context.WithTimeout(context.Background(), vmtest.Within(20*time.Second))
	defer cancel()
	_, err := g.ask(ctx, "true")
	return err == nil
}

// look is the output of a script that succeeds.
func (g *guest) look(ctx context.Context, script string) (string, error) {
	o, err := g.ask(ctx, script)
	if err == nil && o.Status != 0 {
		err = fmt.Errorf("observer: %q: status %d: %s", script, o.Status, o.Output)
	}
	return strings.TrimSpace(o.Output), err
}

// state is what rows could leave in the guest. The directories that storages
// are in stay.
func (g *guest) state(t *testing.T) string {
	t.Helper()
	out, err := g.look(vmtest.Context(t), `
		echo mounts; cut -d' ' -f5- `+g.agent+`/mountinfo
		echo groups; ls `+groupDir+` | grep -v '\.'
		echo files; find /run/kata-containers -xdev ! -name ephemeral ! -name storage | sort
		echo interfaces; ip -o link | sed 's/^[0-9]*: //; s/ .*//'
		echo addresses; ip -o addr | grep -v ' lo  '
		echo routes; ip route; ip neigh
		echo rules; iptables-save 2>/dev/null | grep ^-A; ip6tables-save 2>/dev/null | grep ^-A
		echo swaps; cat /proc/swaps
		echo disks; ls /sys/block
		echo zombies; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l
	`)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// rootfs makes a root file system of busybox in the share.
func (g *guest) rootfs(t *testing.T, id string) string {
	t.Helper()
	root := filepath.Join(g.Share, id, "rootfs")
	for _, dir := range []string{"bin", "dev", "etc", "proc", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	copyFile(t, b, filepath.Join(root, "bin", "busybox"))
	for _, name := range []string{"sh", "cat", "head", "sleep", "stty", "usleep", "dd", "true"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
	return root
}

func copyFile(t *testing.T, b []byte, to string) {
	t.Helper()
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

// container is the request for a container with few rights.
func container(id string, args ...string) *protocol.CreateContainerRequest {
	return &protocol.CreateContainerRequest{
		ContainerId: id, ExecId: id,
		OCI: &protocol.Spec{
			Version: "1.0.2", Process: process(args...),
			Root: &protocol.Root{Path: shareDir + "/" + id + "/rootfs"},
			Mounts: []*protocol.Mount{
				{Destination: "/proc", Type: "proc", Source: "proc"},
				{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
				{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666", "mode=0620"}},
				{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}},
			},
			Linux: &protocol.Linux{
				Namespaces: []*protocol.LinuxNamespace{{Type: "mount"}, {Type: "pid"}},
				Resources:  &protocol.LinuxResources{},
			},
		},
	}
}

func process(args ...string) *protocol.Process {
	return &protocol.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}, User: &protocol.User{}}
}

// everything is all capabilities that the observer has a use for.
func everything() *protocol.LinuxCapabilities {
	caps := []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_KILL", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_RAW",
		"CAP_SETGID", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_MODULE", "CAP_SYS_PTRACE", "CAP_SYS_TIME", "CAP_SYSLOG",
	}
	return &protocol.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
}

// -- what proofs do ------------------------------------------------------------

// look is the output of a script in the guest, which succeeds.
func (e *env) look(script string) string {
	out, err := e.guest.look(e.ctx, script)
	e.ok(err)
	return out
}

// sees waits for the output of a script in the guest.
func (e *env) sees(script, want string) {
	e.t.Helper()
	var got string
	for {
		o, err := e.guest.ask(e.ctx, script)
		if err != nil {
			e.fail("guest has %q, want %q: %s: %w", got, want, script, err)
		}
		if got = strings.TrimSpace(o.Output); got == want {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-e.ctx.Done():
			e.fail("guest has %q, want %q: %s", got, want, script)
		}
	}
}

// later is a context for what is undone.
func (e *env) later() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(e.ctx), vmtest.Timeout)
}

// client is another client of the guest.
func (e *env) client(settings agent.Settings) (agent.Agent, *agent.Client) {
	c := agent.New(settings)
	e.undo.Add(c.Disconnect)
	return e.wrap(c), c
}

// settings are those that reach the guest's agent.
func (e *env) settings() agent.Settings {
	return agent.Settings{Dial: e.guest.Dial, URL: e.guest.AgentURL(extension.AgentPort)}
}

// boot starts a machine of this proof's own.
func (e *env) boot(start func(*testing.T, ...func(*hypervisor.Spec)) *guest, change ...func(*hypervisor.Spec)) {
	g := start(e.t, change...)
	e.undo.Add(g.Kill)
	e.guest, e.Agent = g, e.wrap(g.client)
}

// bootTuned starts one with the tuned kernel, where that was built.
func (e *env) bootTuned(change ...func(*hypervisor.Spec)) bool {
	dir := vmtest.TunedGuest()
	if dir == "" {
		e.t.Log("without the tuned kernel: make kernel")
		return false
	}
	e.boot(startGuest, append(change, func(s *hypervisor.Spec) {
		s.Kernel, s.Initrd = filepath.Join(dir, "vmlinux"), filepath.Join(dir, "initrd.img")
	})...)
	return true
}

var containers int

// create makes a container with a name of its own, which is removed in the end.
func (e *env) create(change func(*protocol.CreateContainerRequest), args ...string) (id string) {
	containers++
	id = fmt.Sprintf("c%d", containers)
	g := e.guest
	g.rootfs(e.t, id)
	e.undo.Add(func() error { return os.RemoveAll(filepath.Join(g.Share, id)) })
	req := container(id, args...)
	if change != nil {
		change(req)
	}
	e.ok(e.CreateContainer(e.ctx, req))
	e.undo.Add(func() error {
		ctx, cancel := e.later()
		defer cancel()
		if g.gone() {
			return nil
		}
		return g.client.StopContainer(ctx, id)
	})
	return id
}

func (g *guest) gone() bool {
	select {
	case <-g.Done():
		return true
	default:
		return false
	}
}

// run makes a container and starts it.
func (e *env) run(args ...string) (id string) { return e.runWith(nil, args...) }

func (e *env) runWith(change func(*protocol.CreateContainerRequest), args ...string) (id string) {
	id = e.create(change, args...)
	e.ok(e.StartContainer(e.ctx, id))
	return id
}

// rooted is the name of a container's file for the observer.
func rooted(id, name string) string { return shareDir + "/" + id + "/rootfs/" + name }

// hostRooted is the same file on the host.
func (e *env) hostRooted(id, name string) string {
	return filepath.Join(e.guest.Share, id, "rootfs", name)
}

// pids are the processes of a container in the guest's /proc.
func (e *env) pids(id string) []string {
	return strings.Fields(e.look(`for p in $(grep -l '/` + id + `$' /proc/[0-9]*/cgroup); do p=${p#/proc/}; echo ${p%/cgroup}; done`))
}

// has says whether a process of the container has such a command line.
func hasCommand(id, args string) string {
	return `for p in $(grep -l '/` + id + `$' /proc/[0-9]*/cgroup); do tr '\0' ' ' < ${p%cgroup}cmdline; echo; done | grep -c '^` + args + ` $'`
}

// sockets are the connections that the guest's agent has, by inode.
func (e *env) sockets() []string {
	list := strings.Fields(e.look(`for f in ` + e.guest.agent + `/fd/*; do readlink $f; done | grep ^socket: | sort`))
	return list
}

// without is what of list is not in other.
func without(list, other []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(other, s) })
}

// stop stops QEMU, until the proof is over.
func (e *env) stop() (resume func()) {
	for _, p := range e.guest.Processes() {
		if p.Role == "qemu" {
			e.ok(unix.Kill(p.PID, unix.SIGSTOP))
			var once sync.Once
			resume = func() { once.Do(func() { _ = unix.Kill(p.PID, unix.SIGCONT) }) }
			e.undo.Add(func() error { resume(); return nil })
			return resume
		}
	}
	e.fail("there is no qemu")
	return nil
}

// number is a number in the output of a script.
func (e *env) number(script string) int64 {
	n, err := strconv.ParseInt(e.look(script), 10, 64)
	e.ok(err)
	return n
}
