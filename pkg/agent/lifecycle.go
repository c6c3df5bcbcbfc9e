package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// Init implements Lifecycle.
func (c *Client) Init(ctx context.Context, settings Settings) (keepVM bool, err error) {
	return settings.Tracing, c.Configure(ctx, settings)
}

// Configure implements Lifecycle. A connection to another machine is closed.
func (c *Client) Configure(_ context.Context, settings Settings) error {
	p := newPeer(settings)
	if _, _, err := p.address(); err != nil && settings.URL != "" {
		return &Error{Err: err}
	}
	c.peer.Swap(p).disconnect()
	return nil
}

// ConfigureFromRPC implements Lifecycle. The connection stays.
func (c *Client) ConfigureFromRPC(_ context.Context, settings Settings) error {
	c.peer.Load().configure(settings)
	return nil
}

// Capabilities implements Lifecycle. The first answer is kept.
func (c *Client) Capabilities(ctx context.Context) (Capabilities, error) {
	return c.peer.Load().caps(ctx)
}

func (p *peer) caps(ctx context.Context) (Capabilities, error) {
	p.mu.Lock()
	known := p.capabilities
	p.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	details, err := p.details(ctx)
	if err != nil {
		return Capabilities{}, err
	}
	caps := capabilities(details.GetAgentDetails())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.capabilities = &caps
	return caps, nil
}

// capabilities reads an agent's account of itself.
func capabilities(d *protocol.AgentDetails) Capabilities {
	storage := func(names ...string) bool {
		return slices.ContainsFunc(d.GetStorageHandlers(), func(s string) bool { return slices.Contains(names, s) })
	}
	feature := func(name string) bool { return slices.Contains(d.GetExtraFeatures(), name) }
	return Capabilities{
		Version:      d.GetVersion(),
		Extension:    feature(extension.FeatureExtension),
		ByteStreams:  feature(extension.FeatureStreams),
		Connect:      feature(extension.FeatureConnect),
		Seccomp:      d.GetSupportsSeccomp(),
		BlockDevices: storage("blk", "scsi", "mmioblk", "nvdimm"),
		SharedFS:     storage("virtio-fs"),
		Storages:     slices.Clone(d.GetStorageHandlers()),
		Devices:      slices.Clone(d.GetDeviceHandlers()),
	}
}

// Check implements Lifecycle.
func (c *Client) Check(ctx context.Context) error {
	answer, err := askHealth(ctx, c.peer.Load(), protocol.HealthService.Check)
	if err != nil {
		return err
	}
	if answer.GetStatus() != protocol.HealthCheckResponse_SERVING {
		status := strings.ToLower(answer.GetStatus().String())
		return &Error{Method: "Check", Err: fmt.Errorf("agent is %s: %w", status, errdefs.ErrUnavailable)}
	}
	return nil
}

// LongLiveConn implements Lifecycle.
func (c *Client) LongLiveConn() bool {
	return !c.peer.Load().current().DialPerCall
}

// Disconnect implements Lifecycle. A later call dials again.
func (c *Client) Disconnect() error {
	c.peer.Load().disconnect()
	return nil
}

// MarkDead implements Lifecycle. Exit statuses that are known stay known.
func (c *Client) MarkDead(cause error) { c.peer.Load().markDead(cause) }

// AgentURL implements Lifecycle.
func (c *Client) AgentURL() (string, error) {
	url := c.peer.Load().current().URL
	if url == "" {
		return "", &Error{Err: errNoAddress}
	}
	return url, nil
}

// SetAgentURL implements Lifecycle. A connection that there is stays.
func (c *Client) SetAgentURL(url string) error { return c.peer.Load().setURL(url) }

// ReuseAgent implements Lifecycle. The address comes with the connection;
// timeouts and the rest of the settings stay this client's own.
func (c *Client) ReuseAgent(from *Client) error {
	if from == nil {
		return fmt.Errorf("reuse agent: no client: %w", errdefs.ErrInvalidArgument)
	}
	if from == c {
		return nil
	}
	taken := from.peer.Load()
	from.peer.Store(newPeer(taken.current()))
	old := c.peer.Swap(taken)
	own := old.current()
	own.Dial, own.URL = nil, ""
	taken.configure(own)
	old.disconnect()
	return nil
}

// CreateSandbox implements Lifecycle. The client itself needs nothing on the
// host but an address.
func (c *Client) CreateSandbox(context.Context) error {
	_, _, err := c.peer.Load().address()
	if err != nil {
		return &Error{Err: err}
	}
	return nil
}

// StartSandbox implements Lifecycle.
func (c *Client) StartSandbox(ctx context.Context, sandbox Sandbox) error {
	if err := c.Check(ctx); err != nil {
		return err
	}
	if sandbox.Policy != "" {
		if err := c.SetPolicy(ctx, sandbox.Policy); err != nil {
			return err
		}
	}
	if err := c.startNetwork(ctx, sandbox); err != nil {
		return err
	}
	return tell(ctx, c.peer.Load(), service.CreateSandbox, sandbox.Request)
}

func (c *Client) startNetwork(ctx context.Context, sandbox Sandbox) error {
	for _, i := range sandbox.Interfaces {
		if _, err := c.UpdateInterface(ctx, i); err != nil {
			return fmt.Errorf("interface %q: %w", i.GetName(), err)
		}
	}
	if len(sandbox.Routes) > 0 {
		if _, err := c.UpdateRoutes(ctx, sandbox.Routes); err != nil {
			return err
		}
	}
	if len(sandbox.Neighbors) > 0 {
		return c.AddARPNeighbors(ctx, sandbox.Neighbors)
	}
	return nil
}

// StopSandbox implements Lifecycle. A guest that closes the connection instead
// of answering is powering off, as it was told.
func (c *Client) StopSandbox(ctx context.Context) error {
	err := tell(ctx, c.peer.Load(), service.DestroySandbox, &protocol.DestroySandboxRequest{})
	if isLost(err) {
		return nil
	}
	return err
}

// Cleanup implements Lifecycle. The client leaves nothing on the host but its
// connections.
func (c *Client) Cleanup(context.Context) error { return c.Disconnect() }

// Save implements State.
func (c *Client) Save() (SavedState, error) {
	url, err := c.AgentURL()
	return SavedState{URL: url}, err
}

// Load implements State.
func (c *Client) Load(state SavedState) error { return c.SetAgentURL(state.URL) }
