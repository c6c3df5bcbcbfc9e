// Package guest proves what the guest image promises, in a running guest: the
// agent is only used to look around in it.
package guest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/ttrpc"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

const shareDir = "/run/kata-containers/shared/containers"

// A guest is a machine with a privileged container in it that sees all of it,
// at /guest.
type guest struct {
	*vmtest.Machine
	tb    testing.TB
	agent protocol.AgentServiceService
	execs int
}

func boot(tb testing.TB, change ...func(*hypervisor.Spec)) *guest {
	tb.Helper()
	g := &guest{Machine: vmtest.Boot(tb, change...), tb: tb}
	conn, err := g.Dial(vmtest.Context(tb), extension.AgentPort)
	if err != nil {
		tb.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	tb.Cleanup(func() { client.Close() })
	g.agent = protocol.NewAgentServiceClient(client)
	ctx := vmtest.Context(tb)
	if _, err := g.agent.CreateSandbox(ctx, &protocol.CreateSandboxRequest{
		Hostname: "guest", SandboxId: "sb",
		Storages: []*protocol.Storage{{Driver: "virtio-fs", Source: "kataShared", Fstype: "virtiofs", MountPoint: shareDir}},
	}); err != nil {
		tb.Fatal(err)
	}
	g.makeRoot()
	if _, err := g.agent.CreateContainer(ctx, &protocol.CreateContainerRequest{ContainerId: "probe", ExecId: "probe", OCI: spec()}); err != nil {
		tb.Fatal(err)
	}
	if _, err := g.agent.StartContainer(ctx, &protocol.StartContainerRequest{ContainerId: "probe"}); err != nil {
		tb.Fatal(err)
	}
	return g
}

// makeRoot makes a root file system of busybox in the share.
func (g *guest) makeRoot() {
	g.tb.Helper()
	root := filepath.Join(g.Share, "rootfs")
	for _, d := range []string{"bin", "dev", "guest", "proc", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			g.tb.Fatal(err)
		}
	}
	if out, err := exec.CommandContext(g.tb.Context(), "cp", "/bin/busybox", filepath.Join(root, "bin")).CombinedOutput(); err != nil {
		g.tb.Fatalf("copy busybox: %v: %s", err, out)
	}
	if err := os.Symlink("busybox", filepath.Join(root, "bin/sh")); err != nil {
		g.tb.Fatal(err)
	}
}

func spec() *protocol.Spec {
	return &protocol.Spec{
		Version: "1.0.2", Process: process("sleep 3600"), Root: &protocol.Root{Path: shareDir + "/rootfs"},
		Mounts: []*protocol.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/guest", Type: "bind", Source: "/", Options: []string{"rbind", "rw"}},
		},
		Linux: &protocol.Linux{
			Namespaces: []*protocol.LinuxNamespace{{Type: "mount"}},
			Resources:  &protocol.LinuxResources{},
		},
	}
}

func process(script string) *protocol.Process {
	all := []string{"CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE", "CAP_SYS_MODULE", "CAP_SYSLOG"}
	return &protocol.Process{
		Args: []string{"/bin/busybox", "sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin:/usr/sbin:/usr/bin"}, User: &protocol.User{},
		Capabilities: &protocol.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all},
	}
}

// start runs a script in the guest.
func (g *guest) start(script string) (execID string) {
	g.tb.Helper()
	g.execs++
	execID = "exec" + strings.Repeat("i", g.execs)
	if _, err := g.agent.ExecProcess(vmtest.Context(g.tb), &protocol.ExecProcessRequest{
		ContainerId: "probe", ExecId: execID, Process: process("exec 2>&1\n" + script),
	}); err != nil {
		g.tb.Fatal(err)
	}
	return execID
}

// run returns what a script printed. It must succeed.
func (g *guest) run(script string) string {
	g.tb.Helper()
	id, ctx := g.start(script), vmtest.Context(g.tb)
	var out strings.Builder
	for {
		resp, err := g.agent.ReadStdout(ctx, &protocol.ReadStreamRequest{ContainerId: "probe", ExecId: id, Len: 1 << 16})
		if err != nil {
			g.tb.Fatal(err)
		}
		if len(resp.GetData()) == 0 {
			break
		}
		out.Write(resp.GetData())
	}
	resp, err := g.agent.WaitProcess(ctx, &protocol.WaitProcessRequest{ContainerId: "probe", ExecId: id})
	if err != nil {
		g.tb.Fatal(err)
	}
	if resp.GetStatus() != 0 {
		g.tb.Errorf("%s\nstatus %d: %s", script, resp.GetStatus(), out.String())
	}
	return out.String()
}

// on is the same guest for a part of a test.
func (g *guest) on(tb testing.TB) *guest {
	part := *g
	part.tb = tb
	g.execs++
	return &part
}
