package agent

import (
	"context"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// CreateContainer implements Containers.
func (c *Client) CreateContainer(ctx context.Context, req *protocol.CreateContainerRequest) error {
	return tell(ctx, c.peer.Load(), service.CreateContainer, req)
}

// StartContainer implements Containers.
func (c *Client) StartContainer(ctx context.Context, containerID string) error {
	return tell(ctx, c.peer.Load(), service.StartContainer, &protocol.StartContainerRequest{ContainerId: containerID})
}

// StopContainer implements Containers. What is known of its processes is forgotten.
func (c *Client) StopContainer(ctx context.Context, containerID string) error {
	p := c.peer.Load()
	err := tell(ctx, p, service.RemoveContainer, &protocol.RemoveContainerRequest{ContainerId: containerID})
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	p.processes.forgetContainer(containerID)
	return nil
}

// UpdateContainer implements Containers.
func (c *Client) UpdateContainer(ctx context.Context, containerID string, resources *protocol.LinuxResources) error {
	return tell(ctx, c.peer.Load(), service.UpdateContainer, &protocol.UpdateContainerRequest{
		ContainerId: containerID,
		Resources:   resources,
	})
}

// StatsContainer implements Containers.
func (c *Client) StatsContainer(ctx context.Context, containerID string) (*protocol.StatsContainerResponse, error) {
	return ask(ctx, c.peer.Load(), service.StatsContainer, &protocol.StatsContainerRequest{ContainerId: containerID})
}

// PauseContainer implements Containers.
func (c *Client) PauseContainer(ctx context.Context, containerID string) error {
	return tell(ctx, c.peer.Load(), service.PauseContainer, &protocol.PauseContainerRequest{ContainerId: containerID})
}

// ResumeContainer implements Containers.
func (c *Client) ResumeContainer(ctx context.Context, containerID string) error {
	return tell(ctx, c.peer.Load(), service.ResumeContainer, &protocol.ResumeContainerRequest{ContainerId: containerID})
}

// oomEvents is one long poll, whose answer waits for the next caller.
type oomEvents struct {
	turn  turn
	polls series[string] // for whoever has the turn
}

// OOMEvent implements Containers. An event that comes after its caller left is
// given to the next one.
func (c *Client) OOMEvent(ctx context.Context) (containerID string, err error) {
	p := c.peer.Load()
	if err := p.oom.turn.take(ctx); err != nil {
		return "", err
	}
	defer p.oom.turn.give()
	return p.oom.polls.next(ctx, p, func(ctx context.Context, l *life) (string, error) {
		event, err := await(ctx, l, service.GetOOMEvent, &protocol.GetOOMEventRequest{})
		return event.GetContainerId(), err
	})
}

// Pids implements Containers.
func (c *Client) Pids(ctx context.Context, containerID string) ([]*extension.ProcessInfo, error) {
	p := c.peer.Load()
	caps, err := p.caps(ctx)
	if err != nil {
		return nil, err
	}
	if !caps.Extension {
		return nil, &Error{Method: "Pids", Err: errdefs.ErrNotImplemented}
	}
	answer, err := askExtension(ctx, p, extension.ExtensionService.Pids, &extension.PidsRequest{ContainerId: containerID})
	return answer.GetProcesses(), err
}

// DiagnosticData implements Containers.
func (c *Client) DiagnosticData(ctx context.Context, logType, containerID string) ([]byte, error) {
	answer, err := ask(ctx, c.peer.Load(), service.GetDiagnosticData, &protocol.GetDiagnosticDataRequest{
		LogType:     logType,
		ContainerId: containerID,
	})
	return answer.GetData(), err
}
