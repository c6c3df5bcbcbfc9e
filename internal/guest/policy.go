package guest

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// SetPolicy implements the protocol.
func (s *service) SetPolicy(context.Context, *protocol.SetPolicyRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("SetPolicy")
}

// MemAgentMemcgSet implements the protocol.
func (s *service) MemAgentMemcgSet(context.Context, *protocol.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return nil, notImplemented("MemAgentMemcgSet")
}

// MemAgentCompactSet implements the protocol.
func (s *service) MemAgentCompactSet(context.Context, *protocol.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return nil, notImplemented("MemAgentCompactSet")
}
