package guest

import (
	"context"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A service is the three services of the protocol, in the files by their names.
// Errors carry a class of errdefs; intercept makes status codes of them.
type service struct {
	cfg     Config
	sandbox *sandbox
}

var (
	_ protocol.AgentServiceService = (*service)(nil)
	_ protocol.HealthService       = (*service)(nil)
	_ extension.ExtensionService   = (*service)(nil)
)

// container finds what a request is about.
func (s *service) container(req interface{ GetContainerId() string }) (*container, error) {
	return s.sandbox.container(req.GetContainerId())
}

// process finds what a request is about.
func (s *service) process(req interface {
	GetContainerId() string
	GetExecId() string
},
) (*process, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	return c.process(req.GetExecId())
}

// Check implements grpc.Health.
func (s *service) Check(context.Context, *protocol.CheckRequest) (*protocol.HealthCheckResponse, error) {
	return &protocol.HealthCheckResponse{Status: protocol.HealthCheckResponse_SERVING}, nil
}

// Version implements grpc.Health.
func (s *service) Version(context.Context, *protocol.CheckRequest) (*protocol.VersionCheckResponse, error) {
	return &protocol.VersionCheckResponse{GrpcVersion: APIVersion, AgentVersion: s.cfg.Version}, nil
}
