package sandbox

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A standIn answers for a guest that does not have the container: the one that
// stands for a pod. What it is there for elsewhere, to keep namespaces and to
// reap, the machine does anyway; what is left of it is to be killed.
type standIn struct {
	// The rest of the operations is not called for such a container.
	containerGuest

	task func() uint32   // the task pid
	lost <-chan struct{} // closed when the machine took it along

	once sync.Once
	done chan struct{} // closed when it was killed
	exit agent.ExitStatus
}

// containerGuest is what a container asks of its guest.
type containerGuest interface {
	agent.Containers
	agent.Processes
}

func newStandIn(task func() uint32, lost <-chan struct{}) *standIn {
	return &standIn{task: task, lost: lost, done: make(chan struct{})}
}

func (p *standIn) end(code int32) {
	p.once.Do(func() {
		p.exit = agent.ExitStatus{Code: code, ExitedAt: time.Now()}
		close(p.done)
	})
}

func (p *standIn) StartContainer(context.Context, string) error  { return nil }
func (p *standIn) PauseContainer(context.Context, string) error  { return nil }
func (p *standIn) ResumeContainer(context.Context, string) error { return nil }
func (p *standIn) ForgetProcess(string, string)                  {}

func (p *standIn) CreateContainer(context.Context, *protocol.CreateContainerRequest) error {
	return nil
}

// StopContainer also ends what was never started.
func (p *standIn) StopContainer(context.Context, string) error {
	p.end(lostCode)
	return nil
}

func (p *standIn) UpdateContainer(context.Context, string, *protocol.LinuxResources) error {
	return nil
}

func (p *standIn) StatsContainer(context.Context, string) (*protocol.StatsContainerResponse, error) {
	return &protocol.StatsContainerResponse{CgroupStats: &protocol.CgroupStats{}}, nil
}

func (p *standIn) Pids(_ context.Context, id string) ([]*extension.ProcessInfo, error) {
	return []*extension.ProcessInfo{{Pid: p.task(), ExecId: id}}, nil
}

func (p *standIn) Exec(context.Context, *protocol.ExecProcessRequest) error {
	return fmt.Errorf("nothing of the pod's own container is in the guest: %w", errdefs.ErrNotImplemented)
}

// SignalProcess does what the usual program does with the signals that it gets.
func (p *standIn) SignalProcess(_ context.Context, id, execID string, signal uint32, _ bool) error {
	if execID != id {
		return fmt.Errorf("process %q: %w", execID, errdefs.ErrNotFound) // none was ever started
	}
	switch unix.Signal(signal) {
	case unix.SIGKILL:
		p.end(lostCode)
	case unix.SIGTERM, unix.SIGINT:
		p.end(0)
	}
	return nil
}

func (p *standIn) WaitProcess(ctx context.Context, _, _ string) (agent.ExitStatus, error) {
	select {
	case <-p.done:
		return p.exit, nil
	case <-p.lost:
		return agent.ExitStatus{}, errStopped
	case <-ctx.Done():
		return agent.ExitStatus{}, context.Cause(ctx)
	}
}

func (p *standIn) WinsizeProcess(context.Context, string, string, uint32, uint32) error { return nil }

func (p *standIn) Streams(context.Context, string, string, agent.StreamSet) (*agent.Streams, error) {
	return &agent.Streams{}, nil
}
