package guest

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runc/libcontainer/seccomp"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const memoryDir = "/sys/devices/system/memory/"

// GetGuestDetails implements the protocol.
func (s *service) GetGuestDetails(_ context.Context, req *protocol.GuestDetailsRequest) (*protocol.GuestDetailsResponse, error) {
	resp := &protocol.GuestDetailsResponse{AgentDetails: &protocol.AgentDetails{
		Version:         s.cfg.Version,
		InitDaemon:      s.cfg.InitDaemon,
		DeviceHandlers:  slices.Sorted(maps.Keys(deviceHandlers)),
		StorageHandlers: slices.Sorted(maps.Keys(mounters)),
		SupportsSeccomp: seccomp.Enabled,
		ExtraFeatures:   []string{extension.FeatureExtension, extension.FeatureStreams, extension.FeatureConnect},
	}}
	if req.GetMemBlockSize() {
		size, err := blockSize()
		if err != nil {
			return nil, err
		}
		resp.MemBlockSizeBytes = size
	}
	if req.GetMemHotplugProbe() {
		_, err := os.Stat(memoryDir + "probe")
		resp.SupportMemHotplugProbe = err == nil
	}
	return resp, nil
}

// blockSize is 0 in a kernel without memory hotplug.
func blockSize() (uint64, error) {
	b, err := os.ReadFile(memoryDir + "block_size_bytes")
	if err != nil {
		return 0, nil //nolint:nilerr // not there
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 16, 64)
	if err != nil {
		return 0, fmt.Errorf("read size of memory blocks: %w", err)
	}
	return n, nil
}
