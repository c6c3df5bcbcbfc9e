package sandbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/log"
)

// Stop removes every container, powers the machine off, and removes every
// trace from the host. Idempotent; whoever comes second waits for the first.
// The context bounds the graceful part: the rest is done whatever happens.
func (s *Sandbox) Stop(ctx context.Context) error {
	s.mu.Lock()
	first := !s.stopping
	s.stopping = true
	s.mu.Unlock()
	if !first {
		select {
		case <-s.stopped:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	defer close(s.stopped)
	s.end(errStopped)
	s.boots.Wait()
	s.tasks.Wait()
	if s.undo == nil { // not started, or undone already
		s.closeGone()
		return nil
	}
	if err := s.powerOff(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("machine was not stopped gracefully")
	}
	left := s.network.close() // before hooks and engines look at it
	for _, c := range s.created() {
		c.lost()
		c.remove(ctx)
	}
	err := errors.Join(left, s.undo.Run())
	s.closeGone()
	s.jobs.Wait()
	if err != nil {
		return fmt.Errorf("stop sandbox %q: %w", s.opts.ID, err)
	}
	return nil
}

// powerOff has the guest end by itself, or kills it in the end.
func (s *Sandbox) powerOff(ctx context.Context) error {
	select {
	case <-s.machine.Done():
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Config.StopTimeout)
	defer cancel()
	told := s.agent.StopSandbox(ctx)
	return errors.Join(told, s.machine.Shutdown(ctx), s.machine.Kill())
}

// closeGone says that the machine is gone.
func (s *Sandbox) closeGone() { s.ending.Do(func() { close(s.gone) }) }
