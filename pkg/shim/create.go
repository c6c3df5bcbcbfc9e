package shim

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

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
	if cfg.Debug {
		log.G(ctx).Logger.SetLevel(log.DebugLevel)
	}
	std := stdioOf(r)
	relay, err := newRelay(ctx, r.GetID(), s.cmd.namespace, std)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			relay.close(ctx)
		}
	}()
	box, rec, first, err := s.enter(cfg, r.GetID(), standsForPod(spec.Annotations))
	if err != nil {
		return nil, err
	}
	if first {
		defer func() {
			if err != nil {
				s.undoFirst(ctx)
			}
		}()
	}
	if err := rec.leave(r.GetBundle()); err != nil {
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

// boot makes the container, and if it is the first one starts the sandbox
// beside that.
func (s *service) boot(ctx context.Context, box *sandbox.Sandbox, first bool, spec *specs.Spec, cfg sandbox.ContainerConfig) (made *sandbox.Container, err error) {
	if !first {
		return box.CreateContainer(ctx, cfg)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return box.Start(gctx, spec) })
	g.Go(func() (err error) {
		made, err = box.CreateContainer(gctx, cfg)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	life := context.WithoutCancel(ctx)
	s.running.Go(func() { s.watch(life, box) })
	return made, nil
}

// undoFirst leaves nothing of a sandbox whose first container is not to be.
func (s *service) undoFirst(ctx context.Context) {
	ctx, cancel := lasting(ctx)
	defer cancel()
	if err := s.leave(ctx); err != nil {
		log.G(ctx).WithError(err).Error("sandbox not stopped cleanly")
	}
}

func containerConfig(r *taskapi.CreateTaskRequest, spec *specs.Spec, relay *relay) sandbox.ContainerConfig {
	cfg := sandbox.ContainerConfig{
		ID:       r.GetID(),
		Bundle:   r.GetBundle(),
		Spec:     spec,
		Terminal: r.GetTerminal(),
		Pause:    standsForPod(spec.Annotations),
	}
	cfg.Streams.Stdin, cfg.Streams.Stdout, cfg.Streams.Stderr = relay.wants()
	cfg.Rootfs = slices.Grow(cfg.Rootfs, len(r.GetRootfs()))[:len(r.GetRootfs())]
	for i, m := range r.GetRootfs() {
		to := &cfg.Rootfs[i]
		to.Type, to.Source, to.Target, to.Options = m.GetType(), m.GetSource(), m.GetTarget(), m.GetOptions()
	}
	return cfg
}
