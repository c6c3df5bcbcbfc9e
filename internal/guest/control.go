package guest

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// WaitProcess implements the protocol. Everybody who waits gets the answer; the
// first to get it takes the process away.
func (s *service) WaitProcess(ctx context.Context, req *protocol.WaitProcessRequest) (*protocol.WaitProcessResponse, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	p, err := c.live(req.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for process %q: %w", p.id, ctx.Err())
	}
	c.waited(p)
	return &protocol.WaitProcessResponse{
		Status: p.exit.status, OomKilled: p.exit.oomKilled, ExitedAt: p.exit.at.UnixNano(),
	}, nil
}

// RemoveContainer implements the protocol.
func (s *service) RemoveContainer(ctx context.Context, req *protocol.RemoveContainerRequest) (*emptypb.Empty, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	if t := req.GetTimeout(); t > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, seconds(t))
		defer cancel()
	}
	return &emptypb.Empty{}, c.remove(ctx)
}

// PauseContainer implements the protocol.
func (s *service) PauseContainer(ctx context.Context, req *protocol.PauseContainerRequest) (*emptypb.Empty, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, c.do(ctx, func() error {
		if st := c.current(); st != running {
			return precondition("container %q is %s", c.id, st)
		}
		if err := c.group.freeze(ctx, c.sandbox.watcher); err != nil {
			return fmt.Errorf("pause container %q: %w", c.id, err)
		}
		return c.to(paused)
	}, func() { _ = c.resume() })
}

// ResumeContainer implements the protocol.
func (s *service) ResumeContainer(ctx context.Context, req *protocol.ResumeContainerRequest) (*emptypb.Empty, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, c.do(ctx, c.resume, nil)
}

func (c *container) resume() error {
	if st := c.current(); st != paused {
		return precondition("container %q is %s", c.id, st)
	}
	if err := c.group.thaw(); err != nil {
		return fmt.Errorf("resume container %q: %w", c.id, err)
	}
	return c.to(running)
}

// UpdateContainer implements the protocol.
func (s *service) UpdateContainer(ctx context.Context, req *protocol.UpdateContainerRequest) (*emptypb.Empty, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, c.do(ctx, func() error {
		if st := c.current(); st == stopped || st == removed {
			return precondition("container %q is %s", c.id, st)
		}
		if cpu := req.GetResources().GetCPU(); cpu != nil {
			set(&c.wanted.cpus, cpu.GetCpus())
			set(&c.wanted.mems, cpu.GetMems())
			clampCPUs(&cpu.Cpus, &cpu.Mems)
		}
		config := c.lib.Config()
		limits := *config.Cgroups
		limits.Resources = mergeResources(config.Cgroups.Resources, req.GetResources())
		config.Cgroups = &limits
		if err := c.lib.Set(config); err != nil {
			return fmt.Errorf("update container %q: %w", c.id, err)
		}
		return nil
	}, nil)
}

// Pids implements the extension.
func (s *service) Pids(_ context.Context, req *extension.PidsRequest) (*extension.PidsResponse, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	pids, err := c.group.pids()
	if err != nil {
		return nil, fmt.Errorf("list processes of container %q: %w", c.id, err)
	}
	names := c.names()
	resp := &extension.PidsResponse{}
	for _, pid := range pids {
		info := &extension.ProcessInfo{Pid: uint32(pid), ExecId: names[pid]}
		describeProcess(info, "/proc")
		resp.Processes = append(resp.Processes, info)
	}
	return resp, nil
}

// names are the exec ids of the processes that run, by pid.
func (c *container) names() map[int]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := map[int]string{}
	for id, p := range c.procs {
		switch {
		case p.ended():
		case p.init:
			names[p.pid] = c.id
		default:
			names[p.pid] = id
		}
	}
	return names
}

// GetOOMEvent implements the protocol.
func (s *service) GetOOMEvent(ctx context.Context, _ *protocol.GetOOMEventRequest) (*protocol.OOMEvent, error) {
	id, err := s.sandbox.oom.pop(ctx)
	if err != nil {
		return nil, err
	}
	return &protocol.OOMEvent{ContainerId: id}, nil
}
