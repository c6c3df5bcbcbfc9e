package vm

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const shareDir = "/run/kata-containers/shared/containers"

// sandbox boots a machine with a sandbox in it.
func sandbox(tb testing.TB) *machine {
	m := boot(tb)
	m.createSandbox()
	return m
}

func (m *machine) createSandbox(change ...func(*protocol.CreateSandboxRequest)) {
	m.tb.Helper()
	req := &protocol.CreateSandboxRequest{
		Hostname: "pod", SandboxId: "sb",
		Storages: []*protocol.Storage{
			{Driver: "virtio-fs", Source: "kataShared", Fstype: "virtiofs", MountPoint: shareDir},
			{Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/shm", Options: []string{"noexec", "nosuid", "nodev", "mode=1777", "size=67108864"}},
		},
	}
	for _, f := range change {
		f(req)
	}
	if _, err := m.agent.CreateSandbox(m.ctx(), req); err != nil {
		m.tb.Fatal(err)
	}
}

func (m *machine) ctx() context.Context { return within(m.tb, vmtest.Within(time.Minute)) }

func within(tb testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	tb.Cleanup(cancel)
	return ctx
}

// rootfs makes a root file system of busybox in the share.
func (m *machine) rootfs(id string) string {
	m.tb.Helper()
	dir := filepath.Join(m.Share, id, "rootfs")
	for _, d := range []string{"bin", "etc", "dev", "proc", "sys", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			m.tb.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", "/bin/busybox", filepath.Join(dir, "bin")).CombinedOutput(); err != nil {
		m.tb.Fatalf("%s: %v", out, err)
	}
	for _, a := range []string{"sh", "cat", "echo", "sleep", "stty", "dd", "id", "ls", "true", "false", "kill", "head", "md5sum", "hostname", "mount", "ip", "ps", "yes", "wc", "tail", "env", "grep", "seq", "readlink", "touch"} {
		_ = os.Symlink("busybox", filepath.Join(dir, "bin", a))
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			m.tb.Fatal(err)
		}
	}
	write("etc/passwd", "root:x:0:0::/root:/bin/sh\nalice:x:1000:1001::/:/bin/sh\n")
	write("etc/group", "root:x:0:\nstaff:x:50:alice\nusers:x:1001:\n")
	return dir
}

var allCaps = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_MKNOD"}

func process(args ...string) *protocol.Process {
	return &protocol.Process{
		Args: args, Cwd: "/", Env: []string{"PATH=/bin"}, User: &protocol.User{}, NoNewPrivileges: true,
		Capabilities: &protocol.LinuxCapabilities{Bounding: allCaps, Effective: allCaps, Permitted: allCaps},
	}
}

func spec(id string, args ...string) *protocol.Spec {
	return &protocol.Spec{
		Version: "1.0.2", Process: process(args...),
		Root: &protocol.Root{Path: shareDir + "/" + id + "/rootfs"},
		Mounts: []*protocol.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "bind", Source: "/run/kata-containers/sandbox/shm", Options: []string{"rbind"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &protocol.Linux{
			Namespaces:  []*protocol.LinuxNamespace{{Type: "ipc"}, {Type: "uts"}, {Type: "mount"}},
			MaskedPaths: []string{"/proc/kcore", "/proc/keys"}, ReadonlyPaths: []string{"/proc/sys"},
			Resources: &protocol.LinuxResources{},
		},
	}
}

// create makes a container that is not started.
func (m *machine) create(id string, change func(*protocol.CreateContainerRequest), args ...string) {
	m.tb.Helper()
	if err := m.tryCreate(id, change, args...); err != nil {
		m.tb.Fatal(err)
	}
}

func (m *machine) tryCreate(id string, change func(*protocol.CreateContainerRequest), args ...string) error {
	m.tb.Helper()
	m.rootfs(id)
	req := &protocol.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec(id, args...)}
	if change != nil {
		change(req)
	}
	_, err := m.agent.CreateContainer(m.ctx(), req)
	return err
}

func (m *machine) startContainer(id string) {
	m.tb.Helper()
	if _, err := m.agent.StartContainer(m.ctx(), &protocol.StartContainerRequest{ContainerId: id}); err != nil {
		m.tb.Fatal(err)
	}
}

func (m *machine) remove(id string) {
	m.tb.Helper()
	if _, err := m.agent.RemoveContainer(m.ctx(), &protocol.RemoveContainerRequest{ContainerId: id, Timeout: 20}); err != nil {
		m.tb.Fatal(err)
	}
}

func (m *machine) wait(id, exec string) *protocol.WaitProcessResponse {
	m.tb.Helper()
	resp, err := m.agent.WaitProcess(m.ctx(), &protocol.WaitProcessRequest{ContainerId: id, ExecId: exec})
	if err != nil {
		m.tb.Fatal(err)
	}
	return resp
}

// stream opens one stream of a process.
func (m *machine) stream(id, exec string, which byte) net.Conn {
	m.tb.Helper()
	conn, err := m.tryStream(id, exec, which)
	if err != nil {
		m.tb.Fatal(err)
	}
	return conn
}

func (m *machine) tryStream(id, exec string, which byte) (net.Conn, error) {
	conn, err := m.Dial(m.ctx(), extension.StreamPort)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(vmtest.Within(2 * time.Minute)))
	if err := extension.WriteStreamHeader(conn, extension.StreamHeader{Stream: which, ContainerID: id, ExecID: exec}); err != nil {
		return nil, err
	}
	status, msg, err := extension.ReadStreamAnswer(conn)
	if err == nil && status != extension.StreamOK {
		err = fmt.Errorf("status %d: %s", status, msg)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// output reads a stream to its end.
func output(tb testing.TB, conn net.Conn) string {
	tb.Helper()
	b, err := io.ReadAll(&extension.ChunkReader{R: conn})
	if err != nil {
		tb.Errorf("stream: %v after %d bytes", err, len(b))
	}
	conn.Close()
	return string(b)
}

// run creates and starts a container and returns what it wrote and its status.
func (m *machine) run(id string, change func(*protocol.CreateContainerRequest), args ...string) (stdout, stderr string, status int32) {
	m.tb.Helper()
	m.create(id, change, args...)
	out, errs := m.stream(id, id, extension.Stdout), m.stream(id, id, extension.Stderr)
	m.startContainer(id)
	stderrc := make(chan string)
	go func() { stderrc <- output(m.tb, errs) }()
	stdout = output(m.tb, out)
	stderr = <-stderrc
	status = m.wait(id, id).GetStatus()
	m.remove(id)
	return stdout, stderr, status
}

// exec runs a process in a container.
func (m *machine) exec(id, exec string, change func(*protocol.ExecProcessRequest), args ...string) (stdout string, status int32) {
	m.tb.Helper()
	req := &protocol.ExecProcessRequest{ContainerId: id, ExecId: exec, Process: process(args...)}
	if change != nil {
		change(req)
	}
	if _, err := m.agent.ExecProcess(m.ctx(), req); err != nil {
		m.tb.Fatal(err)
	}
	stdout = output(m.tb, m.stream(id, exec, extension.Stdout))
	return stdout, m.wait(id, exec).GetStatus()
}

func writeChunks(w io.Writer, data []byte) error {
	for len(data) > 0 {
		n := min(len(data), extension.MaxChunk)
		b := binary.BigEndian.AppendUint32(nil, uint32(n))
		if _, err := w.Write(append(b, data[:n]...)); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}
