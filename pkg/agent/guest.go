package agent

import (
	"context"
	"time"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// GuestDetails implements Guest.
func (c *Client) GuestDetails(ctx context.Context) (*protocol.GuestDetailsResponse, error) {
	return c.peer.Load().details(ctx)
}

func (p *peer) details(ctx context.Context) (*protocol.GuestDetailsResponse, error) {
	return ask(ctx, p, service.GetGuestDetails, &protocol.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true})
}

// SetGuestDateTime implements Guest.
func (c *Client) SetGuestDateTime(ctx context.Context, now time.Time) error {
	return tell(ctx, c.peer.Load(), service.SetGuestDateTime, &protocol.SetGuestDateTimeRequest{
		Sec:  now.Unix(),
		Usec: int64(now.Nanosecond() / 1000),
	})
}

// ReseedRNG implements Guest.
func (c *Client) ReseedRNG(ctx context.Context, data []byte) error {
	return tell(ctx, c.peer.Load(), service.ReseedRandomDev, &protocol.ReseedRandomDevRequest{Data: data})
}

// Metrics implements Guest.
func (c *Client) Metrics(ctx context.Context) (string, error) {
	answer, err := ask(ctx, c.peer.Load(), service.GetMetrics, &protocol.GetMetricsRequest{})
	return answer.GetMetrics(), err
}

// SetPolicy implements Guest.
func (c *Client) SetPolicy(ctx context.Context, policy string) error {
	return tell(ctx, c.peer.Load(), service.SetPolicy, &protocol.SetPolicyRequest{Policy: policy})
}

// Version implements Guest.
func (c *Client) Version(ctx context.Context) (api, agent string, err error) {
	answer, err := askHealth(ctx, c.peer.Load(), protocol.HealthService.Version)
	return answer.GetGrpcVersion(), answer.GetAgentVersion(), err
}

// MemAgentMemcgSet implements Guest.
func (c *Client) MemAgentMemcgSet(ctx context.Context, cfg *protocol.MemAgentMemcgConfig) error {
	return tell(ctx, c.peer.Load(), service.MemAgentMemcgSet, cfg)
}

// MemAgentCompactSet implements Guest.
func (c *Client) MemAgentCompactSet(ctx context.Context, cfg *protocol.MemAgentCompactConfig) error {
	return tell(ctx, c.peer.Load(), service.MemAgentCompactSet, cfg)
}
