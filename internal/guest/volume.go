package guest

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// Volumes: file systems that are mounted already.

// GetVolumeStats implements the protocol.
func (s *service) GetVolumeStats(_ context.Context, req *protocol.VolumeStatsRequest) (*protocol.VolumeStatsResponse, error) {
	path := req.GetVolumeGuestPath()
	if err := checkPath("volume", path); err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	size := uint64(st.Bsize)
	return &protocol.VolumeStatsResponse{
		Usage: []*protocol.VolumeUsage{
			{
				Unit:  protocol.VolumeUsage_BYTES,
				Total: st.Blocks * size, Used: (st.Blocks - st.Bfree) * size, Available: st.Bavail * size,
			},
			{Unit: protocol.VolumeUsage_INODES, Total: st.Files, Used: st.Files - st.Ffree, Available: st.Ffree},
		},
		VolumeCondition: &protocol.VolumeCondition{},
	}, nil
}

// ResizeVolume implements the protocol.
func (s *service) ResizeVolume(context.Context, *protocol.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("ResizeVolume")
}

// UpdateEphemeralMounts implements the protocol.
func (s *service) UpdateEphemeralMounts(context.Context, *protocol.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("UpdateEphemeralMounts")
}

// RemoveStaleVirtiofsShareMounts implements the protocol.
func (s *service) RemoveStaleVirtiofsShareMounts(context.Context, *protocol.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("RemoveStaleVirtiofsShareMounts")
}
