package shim

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

// undoTimeout bounds what must be done although the caller may be gone.
const undoTimeout = 30 * time.Second

var empty = &emptypb.Empty{}

// lasting is ctx for what must be done although the caller may be gone.
func lasting(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// Create makes a container, and starts the sandbox before the first one.
func (s *service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *taskapi.CreateTaskResponse, err error) {
	if r.GetCheckpoint() != "" {
		return nil, fmt.Errorf("create from a checkpoint: %w", errdefs.ErrNotImplemented)
	}
	put, err := s.reserve(r.GetID())
	if err != nil {
		return nil, err
	}
	var c *container
	defer func() { put(c) }()
	if c, err = s.create(ctx, r); err != nil {
		return nil, err
	}
	s.events.publish(ctx, &events.TaskCreate{
		ContainerID: r.GetID(),
		Bundle:      r.GetBundle(),
		Rootfs:      r.GetRootfs(),
		IO: &events.TaskIO{
			Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal(),
		},
		Pid: uint32(c.PID()),
	})
	life := context.WithoutCancel(ctx)
	s.running.Go(func() { s.follow(life, c, c.init) })
	return &taskapi.CreateTaskResponse{Pid: uint32(c.PID())}, nil
}

func (s *service) create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *container, err error) {
	spec, err := readSpec(r.GetBundle())
	if err != nil {
		return nil, err
	}
	cfg, err := settings(r.GetOptions(), spec.Annotations)
	if err != nil {
		return nil, err
	}
	std := stdio{stdin: r.GetStdin(), stdout: r.GetStdout(), stderr: r.GetStderr(), terminal: r.GetTerminal()}
	relay, err := newRelay(ctx, r.GetID(), s.cmd.namespace, std)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			relay.close(ctx)
		}
	}()
	rec := s.self
	rec.Dir = s.dir(cfg)
	if err := s.record(rec, r.GetBundle()); err != nil {
		return nil, err
	}
	box, first, err := s.enter(cfg, r.GetID())
	if err != nil {
		return nil, err
	}
	made, err := s.boot(ctx, box, first, spec, containerConfig(r, spec, relay))
	if err != nil {
		return nil, err
	}
	rec.Task = made.PID()
	if err := rec.write(r.GetBundle()); err != nil {
		// The container is complete; only a delete after a crash would know less.
		log.G(ctx).WithError(err).Warn("task pid not recorded")
	}
	p := newProcess(made.Init(), std, relay)
	relay.start(context.WithoutCancel(ctx), p)
	return newContainer(made, p), nil
}

// record leaves in a bundle what a later delete, and containerd 1.6, need.
func (s *service) record(rec record, bundle string) error {
	if readAddress(bundle) == "" {
		if err := writeAddress(bundle, s.self.Address); err != nil {
			return err
		}
	}
	return rec.write(bundle)
}

// boot makes the container, and if it is the first one starts the sandbox
// beside that. It leaves nothing when it fails.
func (s *service) boot(ctx context.Context, box *sandbox.Sandbox, first bool, spec *specs.Spec, cfg sandbox.ContainerConfig) (*sandbox.Container, error) {
	if !first {
		return box.CreateContainer(ctx, cfg)
	}
	var made *sandbox.Container
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return box.Start(gctx, spec) })
	g.Go(func() (err error) {
		made, err = box.CreateContainer(gctx, cfg)
		return err
	})
	err := g.Wait()
	if err == nil {
		life := context.WithoutCancel(ctx)
		s.running.Go(func() { s.watch(life, box) })
		return made, nil
	}
	undo, cancel := lasting(ctx)
	defer cancel()
	if serr := s.leave(undo); serr != nil {
		log.G(ctx).WithError(serr).Error("sandbox not stopped cleanly")
	}
	return nil, err
}

func containerConfig(r *taskapi.CreateTaskRequest, spec *specs.Spec, relay *relay) sandbox.ContainerConfig {
	cfg := sandbox.ContainerConfig{
		ID:       r.GetID(),
		Bundle:   r.GetBundle(),
		Spec:     spec,
		Terminal: r.GetTerminal(),
	}
	cfg.Streams.Stdin, cfg.Streams.Stdout, cfg.Streams.Stderr = relay.wants()
	cfg.Rootfs = slices.Grow(cfg.Rootfs, len(r.GetRootfs()))[:len(r.GetRootfs())]
	for i, m := range r.GetRootfs() {
		to := &cfg.Rootfs[i]
		to.Type, to.Source, to.Target, to.Options = m.GetType(), m.GetSource(), m.GetTarget(), m.GetOptions()
	}
	return cfg
}

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
		return &taskapi.StartResponse{Pid: pid}, nil
	}
	if err := p.Start(ctx); err != nil {
		p.finish()
		return nil, err
	}
	life := context.WithoutCancel(ctx)
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
	std := stdio{stdin: r.GetStdin(), stdout: r.GetStdout(), stderr: r.GetStderr(), terminal: r.GetTerminal()}
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

// Delete removes a container, or an exec'd process.
func (s *service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	select { // one at a time
	case p.deleting <- struct{}{}:
		defer func() { <-p.deleting }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if p == c.init {
		err = s.deleteContainer(ctx, c)
	} else {
		err = s.deleteExec(ctx, c, p)
	}
	if err != nil {
		return nil, err
	}
	code, at := p.exit()
	return &taskapi.DeleteResponse{Pid: uint32(c.PID()), ExitStatus: code, ExitedAt: at}, nil
}

func (s *service) deleteExec(ctx context.Context, c *container, p *process) error {
	if err := p.ready(ctx); err != nil {
		return fmt.Errorf("delete process %q of container %q: %w", p.ExecID(), c.ID(), err)
	}
	undo, cancel := lasting(ctx)
	defer cancel()
	if err := p.Process.Delete(undo); err != nil {
		return err
	}
	c.drop(p.ExecID())
	c.release(undo, p)
	return nil
}

func (s *service) deleteContainer(ctx context.Context, c *container) error {
	if _, err := s.container(c.ID()); err != nil {
		return err // another call was faster
	}
	if err := c.init.ready(ctx); err != nil {
		return fmt.Errorf("delete container %q: %w", c.ID(), err)
	}
	undo, cancel := lasting(ctx)
	defer cancel()
	if err := c.Container.Delete(undo); err != nil {
		return err
	}
	c.abandon(undo)
	last := s.remove(c.ID())
	code, at := c.init.exit()
	s.events.publish(ctx, &events.TaskDelete{
		ContainerID: c.ID(), Pid: uint32(c.PID()), ExitStatus: code, ExitedAt: at,
	})
	if last {
		if err := s.leave(undo); err != nil {
			log.G(ctx).WithError(err).Error("sandbox not stopped cleanly")
		}
	}
	return nil
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
