package agent

import (
	"context"
	"time"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// WaitProcess implements Processes. The guest is asked once per process,
// however many wait: it forgets a process with the first answer.
func (c *Client) WaitProcess(ctx context.Context, containerID, execID string) (ExitStatus, error) {
	p := c.peer.Load()
	return p.exit(ctx, processOf(containerID, execID)).wait(ctx)
}

// exit is the call in flight or its result. One that failed is made again.
func (p *peer) exit(ctx context.Context, id process) *pending[ExitStatus] {
	p.processes.mu.Lock()
	defer p.processes.mu.Unlock()
	s := p.processes.getLocked(id)
	if s.exit == nil || s.exit.over() && s.exit.err != nil {
		s.exit = begin(ctx, p, func(ctx context.Context, l *life) (ExitStatus, error) { return l.exit(ctx, id) })
	}
	return s.exit
}

func (l *life) exit(ctx context.Context, id process) (ExitStatus, error) {
	// A plain peer drops what is left of the output when it has answered.
	for _, drained := range l.peer.processes.drained(id) {
		select {
		case <-drained:
		case <-l.ended:
			return ExitStatus{}, &Error{Method: "WaitProcess", Err: l.cause}
		}
	}
	answer, err := await(ctx, l, service.WaitProcess, &protocol.WaitProcessRequest{
		ContainerId: id.containerID,
		ExecId:      id.execID,
	})
	if err != nil {
		return ExitStatus{}, err
	}
	exit := ExitStatus{Code: answer.GetStatus(), ExitedAt: time.Now(), OOMKilled: answer.GetOomKilled()}
	if ns := answer.GetExitedAt(); ns != 0 {
		exit.ExitedAt = time.Unix(0, ns)
	}
	return exit, nil
}
