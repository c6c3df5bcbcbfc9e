package vm

import (
	"context"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// TestVMKillWhileHanging: a share that does not answer holds up a create, an exec
// and a remove, and nothing else; signals do not wait for any of them.
func TestVMKillWhileHanging(t *testing.T) {
	m := sandbox(t)
	// The kernel does not finish a process before the share has closed its
	// program, so those that are to end have theirs in the guest's memory.
	const memory = "/run/kata-containers/sandbox/ephemeral/root"
	inMemory := func(r *protocol.CreateContainerRequest) {
		r.Storages = append(r.Storages, &protocol.Storage{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: memory})
	}
	m.create("copier", func(r *protocol.CreateContainerRequest) {
		inMemory(r)
		r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/memory", Source: memory, Type: "bind", Options: []string{"bind"}})
	}, "/bin/busybox", "cp", "-a", "/bin", "/memory/")
	m.startContainer("copier")
	m.wait("copier", "copier")
	m.create("busy", nil, "/bin/sleep", "1000")
	for _, id := range []string{"other", "victim"} {
		m.create(id, func(r *protocol.CreateContainerRequest) {
			inMemory(r)
			r.OCI.Root.Path = memory
		}, "/bin/sleep", "1000")
	}
	for _, id := range []string{"busy", "other", "victim"} {
		m.startContainer(id)
	}
	for _, id := range []string{"busy", "other", "victim"} {
		m.eventually("it runs", func() bool { return m.comm(id) == "sleep" })
	}
	m.rootfs("hung")

	m.signalShare(syscall.SIGSTOP)

	created, executed, removed := make(chan error, 1), make(chan error, 1), make(chan error, 1)
	long := within(t, vmtest.Within(2*time.Minute))
	go func() {
		_, err := m.agent.CreateContainer(long, &protocol.CreateContainerRequest{ContainerId: "hung", OCI: spec("hung", "/bin/busybox", "sleep", "1")})
		created <- err
	}()
	go func() {
		_, err := m.agent.ExecProcess(long, &protocol.ExecProcessRequest{ContainerId: "busy", ExecId: "e", Process: process("/bin/busybox", "true")})
		executed <- err
	}()
	select {
	case err := <-created:
		t.Fatalf("create did not hang: %v", err)
	case err := <-executed:
		t.Fatalf("exec did not hang: %v", err)
	case <-time.After(2 * time.Second):
	}

	soon := func(what string, f func(ctx context.Context) error) {
		t.Helper()
		start := time.Now()
		if err := f(within(t, vmtest.Within(5*time.Second))); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if d := time.Since(start); d > vmtest.Within(time.Second) {
			t.Errorf("%s took %v", what, d)
		}
	}
	kill := func(id string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := m.ext.Signal(ctx, &extension.SignalRequest{ContainerId: id, ExecId: id, Signal: 9})
			return err
		}
	}
	soon("check", func(ctx context.Context) error {
		_, err := m.health.Check(ctx, &protocol.CheckRequest{})
		return err
	})
	soon("kill another container", kill("other"))
	if got := m.wait("other", "other").GetStatus(); got != 137 {
		t.Errorf("status %d", got)
	}
	soon("stats", func(ctx context.Context) error {
		_, err := m.agent.StatsContainer(ctx, &protocol.StatsContainerRequest{ContainerId: "busy"})
		return err
	})
	soon("kill the container with the exec", kill("busy"))
	soon("kill the container that is being created", kill("hung"))
	soon("kill by the protocol's own call", func(ctx context.Context) error {
		_, err := m.agent.SignalProcess(ctx, &protocol.SignalProcessRequest{ContainerId: "victim", Signal: 9})
		return err
	})
	if got := m.wait("victim", "victim").GetStatus(); got != 137 {
		t.Errorf("status %d", got)
	}

	// Who waits for what hangs gives up in time.
	go func() {
		_, err := m.agent.RemoveContainer(long, &protocol.RemoveContainerRequest{ContainerId: "busy", Timeout: 1})
		removed <- err
	}()
	select {
	case err := <-removed:
		wantClass(t, "remove", err, context.DeadlineExceeded)
	case <-time.After(vmtest.Within(10 * time.Second)):
		t.Error("remove ignores its timeout")
	}

	// When the share is back everything is as it should be.
	m.signalShare(syscall.SIGCONT)
	if err := <-created; err == nil {
		t.Error("a killed container was created")
	}
	if err := <-executed; err == nil {
		t.Error("an exec in a killed container worked")
	}
	m.eventually("the remove that was given up", func() bool {
		_, err := m.agent.RemoveContainer(m.ctx(), &protocol.RemoveContainerRequest{ContainerId: "busy", Timeout: 20})
		return errdefs.IsNotFound(class(err))
	})
	m.remove("other")
	m.remove("victim")
	m.remove("copier")
	out, _, _ := m.run("hung", nil, "/bin/echo", "alive")
	if out != "alive\n" {
		t.Errorf("got %q", out)
	}
}
