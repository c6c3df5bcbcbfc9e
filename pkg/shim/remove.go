package shim

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/log"
)

// undoTimeout bounds what must be done although the caller may be gone.
const undoTimeout = 30 * time.Second

// lasting is ctx for what must be done although the caller may be gone.
func lasting(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
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
