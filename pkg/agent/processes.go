package agent

import (
	"cmp"
	"context"
	"slices"
	"sync"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A process is named by its container and its exec id, which is the
// container's for the first process.
type process struct{ containerID, execID string }

// processOf accepts an empty exec id for the first process: on the wire it
// could mean all of them.
func processOf(containerID, execID string) process {
	return process{containerID, cmp.Or(execID, containerID)}
}

// A processState is what is kept of a process between calls.
type processState struct {
	stdin          *input
	stdout, stderr *output

	// Guarded by processes.mu.
	exit   *pending[ExitStatus]
	drains []<-chan struct{} // plain outputs; closed at their end
	cuts   []func()          // ends what is open
}

// processes is what is known of processes, until they are forgotten.
type processes struct {
	mu    sync.Mutex
	known map[process]*processState // guarded by mu
}

// get finds the state of a process, or makes it.
func (ps *processes) get(id process) *processState {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return ps.getLocked(id)
}

func (ps *processes) getLocked(id process) *processState {
	s := ps.known[id]
	if s == nil {
		s = &processState{
			stdin:  &input{turn: newTurn()},
			stdout: &output{turn: newTurn()},
			stderr: &output{turn: newTurn()},
		}
		ps.known[id] = s
	}
	return s
}

// opened remembers how to end what was opened for a process.
func (ps *processes) opened(id process, cuts []func(), drains []<-chan struct{}) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	s := ps.getLocked(id)
	s.cuts = append(s.cuts, cuts...)
	s.drains = append(s.drains, drains...)
}

func (ps *processes) forgetContainer(id string) {
	ps.forget(func(p process) bool { return p.containerID == id })
}

// forget drops the processes that match, and ends their streams.
func (ps *processes) forget(match func(process) bool) {
	var cuts []func()
	ps.mu.Lock()
	for id, s := range ps.known {
		if match(id) {
			cuts = append(cuts, s.cuts...)
			delete(ps.known, id)
		}
	}
	ps.mu.Unlock()
	for _, cut := range cuts {
		cut()
	}
}

// Exec implements Processes.
func (c *Client) Exec(ctx context.Context, req *protocol.ExecProcessRequest) error {
	return tell(ctx, c.peer.Load(), service.ExecProcess, req)
}

// SignalProcess implements Processes. A peer with our extension delivers what
// was asked for; to a plain one, all is the empty exec id.
func (c *Client) SignalProcess(ctx context.Context, containerID, execID string, signal uint32, all bool) error {
	p := c.peer.Load()
	caps, err := p.caps(ctx)
	if err != nil {
		return err
	}
	id := processOf(containerID, execID)
	if all {
		id.execID = ""
	}
	if !caps.Extension {
		return tell(ctx, p, service.SignalProcess, &protocol.SignalProcessRequest{
			ContainerId: id.containerID,
			ExecId:      id.execID,
			Signal:      signal,
		})
	}
	_, err = askExtension(ctx, p, extension.ExtensionService.Signal, &extension.SignalRequest{
		ContainerId: id.containerID,
		ExecId:      id.execID,
		Signal:      signal,
		All:         all,
	})
	return err
}

// WinsizeProcess implements Processes.
func (c *Client) WinsizeProcess(ctx context.Context, containerID, execID string, rows, columns uint32) error {
	id := processOf(containerID, execID)
	return tell(ctx, c.peer.Load(), service.TtyWinResize, &protocol.TtyWinResizeRequest{
		ContainerId: id.containerID,
		ExecId:      id.execID,
		Row:         rows,
		Column:      columns,
	})
}

// ForgetProcess implements Processes. Streams of it that are still open are cut.
func (c *Client) ForgetProcess(containerID, execID string) {
	id := processOf(containerID, execID)
	c.peer.Load().processes.forget(func(p process) bool { return p == id })
}

// drained gives the ends of the plain outputs that somebody reads.
func (ps *processes) drained(id process) []<-chan struct{} {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if s := ps.known[id]; s != nil {
		return slices.Clone(s.drains)
	}
	return nil
}
