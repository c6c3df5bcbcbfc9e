package shim

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// With containerd's sandbox API there is no pause container, and no bundle
// with a specification: the pod's configuration comes with CreateSandbox. The
// sandbox has a container that stands for the pod here, too; only that no task
// of containerd's is it.

const sandboxService = "containerd.runtime.sandbox.v1.Sandbox"

// States, as CRI spells them.
const (
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"
)

func (s *service) registerSandbox(server *ttrpc.Server) {
	server.RegisterService(sandboxService, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"CreateSandbox":   method(changing(s, s.CreateSandbox)),
		"StartSandbox":    method(changing(s, s.StartSandbox)),
		"Platform":        method(s.Platform),
		"StopSandbox":     method(s.StopSandbox),
		"WaitSandbox":     method(s.WaitSandbox),
		"SandboxStatus":   method(s.SandboxStatus),
		"PingSandbox":     method(s.PingSandbox),
		"ShutdownSandbox": method(s.ShutdownSandbox),
		"SandboxMetrics":  method(s.SandboxMetrics),
		"UpdateSandbox":   method(changing(s, s.UpdateSandbox)),
	}})
}

var _ sandboxapi.TTRPCSandboxService = (*service)(nil)

// A podSandbox is the sandbox of the API.
type podSandbox struct {
	config  *podConfig
	bundle  string
	created time.Time
	stand   *sandbox.Container // nil before StartSandbox; guarded by the service's mu
}

// theSandbox is the one that was created; ErrNotFound.
func (s *service) theSandbox(id string) (*podSandbox, *sandbox.Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod == nil || id != s.cmd.id {
		return nil, nil, fmt.Errorf("sandbox %q: %w", id, errdefs.ErrNotFound)
	}
	return s.pod, s.pod.stand, nil
}

// started is what stands for theSandbox, which must have been started.
func (s *service) started(id string) (*sandbox.Container, error) {
	_, stand, err := s.theSandbox(id)
	if err == nil && stand == nil {
		err = fmt.Errorf("sandbox %q was not started: %w", id, errdefs.ErrFailedPrecondition)
	}
	return stand, err
}

// CreateSandbox takes the configuration. Nothing is touched.
func (s *service) CreateSandbox(_ context.Context, r *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	if r.GetSandboxID() != s.cmd.id {
		return nil, fmt.Errorf("sandbox %q is not %q: %w", r.GetSandboxID(), s.cmd.id, errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(r.GetBundlePath()) {
		return nil, fmt.Errorf("sandbox %q: bundle %q: %w", r.GetSandboxID(), r.GetBundlePath(), errdefs.ErrInvalidArgument)
	}
	p, err := newPodConfig(r.GetOptions(), r.GetNetnsPath())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod != nil || s.box != nil {
		return nil, fmt.Errorf("sandbox %q: %w", s.cmd.id, errdefs.ErrAlreadyExists)
	}
	s.pod = &podSandbox{config: p, bundle: r.GetBundlePath(), created: time.Now()}
	return &sandboxapi.CreateSandboxResponse{}, nil
}

// StartSandbox boots the machine.
func (s *service) StartSandbox(ctx context.Context, r *sandboxapi.StartSandboxRequest) (_ *sandboxapi.StartSandboxResponse, err error) {
	p, stand, err := s.theSandbox(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	if stand != nil {
		return nil, fmt.Errorf("sandbox %q was started: %w", r.GetSandboxID(), errdefs.ErrAlreadyExists)
	}
	spec := p.config.spec()
	cfg, err := settings(s.cmd.options, spec.Annotations)
	if err != nil {
		return nil, err
	}
	if cfg.Debug {
		log.G(ctx).Logger.SetLevel(log.DebugLevel)
	}
	files, err := p.config.files()
	if err != nil {
		return nil, err
	}
	box, rec, first, err := s.enter(cfg, r.GetSandboxID(), true, files...)
	if err != nil {
		return nil, err
	}
	if !first {
		return nil, fmt.Errorf("sandbox %q is being started: %w", r.GetSandboxID(), errdefs.ErrAlreadyExists)
	}
	defer func() {
		if err != nil {
			s.undoFirst(ctx)
		}
	}()
	if err := rec.leave(p.bundle); err != nil {
		return nil, err
	}
	stand, err = s.boot(ctx, box, true, spec, sandbox.ContainerConfig{
		ID: r.GetSandboxID(), Bundle: p.bundle, Spec: spec, Pause: true,
	})
	if err != nil {
		return nil, err
	}
	if err := stand.Start(ctx); err != nil {
		return nil, err
	}
	rec.Task = stand.PID()
	if err := rec.write(p.bundle); err != nil {
		log.G(ctx).WithError(err).Warn("task pid not recorded")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.stand, p.created = stand, time.Now()
	return &sandboxapi.StartSandboxResponse{Pid: uint32(stand.PID()), CreatedAt: timestamppb.New(p.created)}, nil
}

// Platform is the guest's.
func (s *service) Platform(context.Context, *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the pod and its machine. Its state stays until
// ShutdownSandbox.
func (s *service) StopSandbox(ctx context.Context, r *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	_, stand, err := s.theSandbox(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	if stand != nil && stand.Status() != sandbox.Stopped {
		if err := stand.Kill(ctx, uint32(unix.SIGTERM), true); err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
	}
	undo, cancel := lasting(ctx)
	defer cancel()
	return &sandboxapi.StopSandboxResponse{}, s.leave(undo)
}

// WaitSandbox waits for the end of the pod: 0 when it was stopped, 137 when its
// machine ended.
func (s *service) WaitSandbox(ctx context.Context, r *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	stand, err := s.started(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	select {
	case <-stand.Init().Done():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	exit := stand.Init().Exit()
	return &sandboxapi.WaitSandboxResponse{ExitStatus: uint32(exit.Code), ExitedAt: timestamppb.New(exit.ExitedAt)}, nil
}

// SandboxStatus never asks the guest.
func (s *service) SandboxStatus(_ context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	p, stand, err := s.theSandbox(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	created := p.created
	s.mu.Unlock()
	resp := &sandboxapi.SandboxStatusResponse{
		SandboxID: r.GetSandboxID(), State: stateNotReady, CreatedAt: timestamppb.New(created),
	}
	if stand == nil {
		return resp, nil
	}
	resp.Pid = uint32(stand.PID())
	if stand.Status() == sandbox.Stopped {
		resp.ExitedAt = timestamppb.New(stand.Init().Exit().ExitedAt)
	} else {
		resp.State = stateReady
	}
	if r.GetVerbose() {
		s.mu.Lock()
		resp.Info = map[string]string{"directory": s.self.Dir}
		s.mu.Unlock()
	}
	return resp, nil
}

// PingSandbox fails when the sandbox does not run.
func (s *service) PingSandbox(_ context.Context, r *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	stand, err := s.started(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	if stand.Status() == sandbox.Stopped {
		return nil, fmt.Errorf("sandbox %q has ended: %w", r.GetSandboxID(), errdefs.ErrUnavailable)
	}
	return &sandboxapi.PingResponse{}, nil
}

// SandboxMetrics are what the pod costs on the host, its machine included. A host
// without a group for it knows nothing.
func (s *service) SandboxMetrics(ctx context.Context, r *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	stand, err := s.started(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	box := s.box
	s.mu.Unlock()
	var m *anypb.Any
	if box != nil {
		var cost proto.Message
		if cost, err = box.HostMetrics(); err == nil {
			m, err = encodeMetrics(cost)
		}
	}
	if box == nil || errdefs.IsNotFound(err) {
		var stats *protocol.StatsContainerResponse
		if stats, err = stand.Stats(ctx); err == nil {
			m, err = metrics(stats, hostUnified())
		}
	}
	if err != nil {
		return nil, err
	}
	return &sandboxapi.SandboxMetricsResponse{
		Metrics: &types.Metric{Timestamp: timestamppb.New(time.Now()), ID: r.GetSandboxID(), Data: m},
	}, nil
}

// UpdateSandbox gives the machine the size for the pod's resources, when it is
// those that changed.
func (s *service) UpdateSandbox(ctx context.Context, r *sandboxapi.UpdateSandboxRequest) (*sandboxapi.UpdateSandboxResponse, error) {
	if _, err := s.started(r.GetSandboxID()); err != nil {
		return nil, err
	}
	resources, err := updateOf(r)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	box := s.box
	s.mu.Unlock()
	if box == nil {
		return nil, fmt.Errorf("sandbox %q has ended: %w", r.GetSandboxID(), errdefs.ErrFailedPrecondition)
	}
	if resources != nil {
		err = box.Update(ctx, resources)
	}
	return &sandboxapi.UpdateSandboxResponse{}, err
}

// ShutdownSandbox ends the daemon, and with it whatever is left of the pod.
func (s *service) ShutdownSandbox(ctx context.Context, _ *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	undo, cancel := lasting(ctx)
	defer cancel()
	err := s.leave(undo)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.done)
	}
	return &sandboxapi.ShutdownSandboxResponse{}, err
}
