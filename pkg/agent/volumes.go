package agent

import (
	"context"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// GuestVolumeStats implements Volumes.
func (c *Client) GuestVolumeStats(ctx context.Context, path string) (*protocol.VolumeStatsResponse, error) {
	return ask(ctx, c.peer.Load(), service.GetVolumeStats, &protocol.VolumeStatsRequest{VolumeGuestPath: path})
}

// ResizeGuestVolume implements Volumes.
func (c *Client) ResizeGuestVolume(ctx context.Context, path string, size uint64) error {
	return tell(ctx, c.peer.Load(), service.ResizeVolume, &protocol.ResizeVolumeRequest{VolumeGuestPath: path, Size: size})
}

// RemoveStaleShareMounts implements Volumes.
func (c *Client) RemoveStaleShareMounts(ctx context.Context) error {
	return tell(ctx, c.peer.Load(), service.RemoveStaleVirtiofsShareMounts, &protocol.RemoveStaleVirtiofsShareMountsRequest{})
}

// UpdateEphemeralMounts implements Volumes.
func (c *Client) UpdateEphemeralMounts(ctx context.Context, storages []*protocol.Storage) error {
	return tell(ctx, c.peer.Load(), service.UpdateEphemeralMounts, &protocol.UpdateEphemeralMountsRequest{Storages: storages})
}
