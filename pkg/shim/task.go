package shim

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

var empty = &emptypb.Empty{}

// Start runs the first process of a container, or an exec'd one.
func (s *service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	started, err := c.beginStart(p)
	if err != nil {
		return nil, err
	}
	defer started()
	pid := uint32(c.PID())
	if p == c.init {
		if err := c.Container.Start(ctx); err != nil {
			return nil, err
		}
		p.relay.openInput(ctx)
		s.events.publish(ctx, &events.TaskStart{ContainerID: c.ID(), Pid: pid})
		s.hear(ctx, c)
		return &taskapi.StartResponse{Pid: pid}, nil
	}
	life := context.WithoutCancel(ctx)
	if err := p.Start(ctx); err != nil {
		p.finish()
		p.relay.close(life) // containerd's client waits for the end of its streams
		return nil, err
	}
	p.relay.start(life, p)
	p.relay.openInput(ctx)
	s.events.publish(ctx, &events.TaskExecStarted{ContainerID: c.ID(), ExecID: p.ExecID(), Pid: pid})
	s.running.Go(func() { s.follow(life, c, p) })
	return &taskapi.StartResponse{Pid: pid}, nil
}

// Exec registers a process that Start then starts.
func (s *service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	spec, err := decodeAny[specs.Process](r.GetSpec())
	if err != nil {
		return nil, err
	}
	std := stdioOf(r)
	relay, err := newRelay(ctx, r.GetExecID(), s.cmd.namespace, std)
	if err != nil {
		return nil, err
	}
	cfg := sandbox.ExecConfig{ID: r.GetExecID(), Process: spec, Terminal: r.GetTerminal()}
	cfg.Streams.Stdin, cfg.Streams.Stdout, cfg.Streams.Stderr = relay.wants()
	p, err := c.Container.Exec(ctx, cfg)
	if err != nil {
		relay.close(ctx)
		return nil, err
	}
	c.add(newProcess(p, std, relay))
	s.events.publish(ctx, &events.TaskExecAdded{ContainerID: c.ID(), ExecID: p.ExecID()})
	return empty, nil
}

// State never asks the guest.
func (s *service) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	status := map[sandbox.Status]task.Status{
		sandbox.Created: task.Status_CREATED,
		sandbox.Running: task.Status_RUNNING,
		sandbox.Paused:  task.Status_PAUSED,
		sandbox.Stopped: task.Status_STOPPED,
	}
	resp := &taskapi.StateResponse{
		ID:       c.ID(),
		ExecID:   p.ExecID(),
		Bundle:   c.Bundle(),
		Status:   status[p.Status()],
		Stdin:    p.stdio.stdin,
		Stdout:   p.stdio.stdout,
		Stderr:   p.stdio.stderr,
		Terminal: p.stdio.terminal,
	}
	if p == c.init {
		resp.Status = status[c.Status()]
	}
	if p == c.init || resp.Status != task.Status_CREATED {
		resp.Pid = uint32(c.PID())
	}
	if resp.Status == task.Status_STOPPED {
		resp.ExitStatus, resp.ExitedAt = p.exit()
	}
	return resp, nil
}

// Pids lists the guest's processes.
func (s *service) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	ps, err := c.Container.Pids(ctx)
	if err != nil {
		return nil, err
	}
	resp := &taskapi.PidsResponse{}
	for _, p := range ps {
		info := &task.ProcessInfo{Pid: p.GetPid()}
		if id := p.GetExecId(); id != "" && id != c.ID() {
			details := &options.ProcessDetails{ExecID: id}
			value, err := proto.Marshal(details)
			if err != nil {
				return nil, fmt.Errorf("encode process details: %w", err)
			}
			info.Info = &anypb.Any{TypeUrl: string(details.ProtoReflect().Descriptor().FullName()), Value: value}
		}
		resp.Processes = append(resp.Processes, info)
	}
	return resp, nil
}

// Pause freezes a container.
func (s *service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	if err := c.Container.Pause(ctx); err != nil {
		return nil, err
	}
	s.events.publish(ctx, &events.TaskPaused{ContainerID: c.ID()})
	return empty, nil
}

// Resume thaws it.
func (s *service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	if err := c.Container.Resume(ctx); err != nil {
		return nil, err
	}
	s.events.publish(ctx, &events.TaskResumed{ContainerID: c.ID()})
	return empty, nil
}

// Kill delivers a signal.
func (s *service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if p == c.init {
		err = c.Container.Kill(ctx, r.GetSignal(), r.GetAll())
	} else {
		err = p.Kill(ctx, r.GetSignal())
	}
	if err != nil {
		return nil, err
	}
	return empty, nil
}

// ResizePty sets the size of a terminal.
func (s *service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if err := p.Resize(ctx, r.GetHeight(), r.GetWidth()); err != nil {
		return nil, err
	}
	return empty, nil
}

// CloseIO is the end of stdin.
func (s *service) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if r.GetStdin() {
		p.relay.endInput()
	}
	return empty, nil
}

// Update changes the resources of a container.
func (s *service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	resources, err := decodeAny[specs.LinuxResources](r.GetResources())
	if err != nil {
		return nil, err
	}
	if err := c.Container.Update(ctx, resources); err != nil {
		return nil, err
	}
	return empty, nil
}

// Wait waits until the exit of a process has been published.
func (s *service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.over:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	code, at := p.exit()
	return &taskapi.WaitResponse{ExitStatus: code, ExitedAt: at}, nil
}

// Stats are the guest's numbers, in the type of the host's.
func (s *service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	stats, err := c.Container.Stats(ctx)
	if err != nil {
		return nil, err
	}
	m, err := metrics(stats, hostUnified())
	if err != nil {
		return nil, err
	}
	return &taskapi.StatsResponse{Stats: m}, nil
}

// Connect names the shim's process and the task's.
func (s *service) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	resp := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: s.opts.Version}
	if c, err := s.container(r.GetID()); err == nil {
		resp.TaskPid = uint32(c.PID())
	}
	return resp, nil
}

// Checkpoint is not there yet.
func (s *service) Checkpoint(context.Context, *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("checkpoint: %w", errdefs.ErrNotImplemented)
}

// Shutdown ends the daemon when it has no containers.
func (s *service) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	s.shutdown()
	return empty, nil
}

// exit says how the process ended; one that never ran was killed.
func (p *process) exit() (code uint32, at *timestamppb.Timestamp) {
	select {
	case <-p.Done():
		e := p.Exit()
		return uint32(e.Code), timestamppb.New(e.ExitedAt)
	default:
		return exitKilled, timestamppb.New(time.Now())
	}
}
