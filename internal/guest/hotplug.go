package guest

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// What the host plugs into a running machine.

// OnlineCPUMem implements the protocol.
func (s *service) OnlineCPUMem(context.Context, *protocol.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("OnlineCPUMem")
}

// MemHotplugByProbe implements the protocol.
func (s *service) MemHotplugByProbe(context.Context, *protocol.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("MemHotplugByProbe")
}

// AddSwap implements the protocol.
func (s *service) AddSwap(context.Context, *protocol.AddSwapRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("AddSwap")
}

// AddSwapPath implements the protocol.
func (s *service) AddSwapPath(context.Context, *protocol.AddSwapPathRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("AddSwapPath")
}
