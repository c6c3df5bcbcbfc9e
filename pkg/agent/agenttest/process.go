package agenttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A Process is one that the host created. Its streams are pipes.
type Process struct {
	ContainerID, ExecID string
	Create              *protocol.CreateContainerRequest // of a first process
	Exec                *protocol.ExecProcessRequest     // of the others

	Stdin, Stdout, Stderr *os.File
	Signals               chan uint32 // those that are left to the program

	stdin, stdout, stderr *os.File // the other ends
	kill                  context.CancelCauseFunc
	started               chan struct{}
	startOnce             sync.Once
	ended                 chan struct{}
	code                  int32 // valid once ended is closed

	mu        sync.Mutex
	taken     [3]bool // byte streams; guarded by mu
	OOMKilled bool    // reported with the exit; for the program
}

type killed uint32

func (k killed) Error() string { return fmt.Sprintf("signal %d", uint32(k)) }

func (p *Peer) add(containerID, execID string) (*Process, error) {
	key := [2]string{containerID, execID}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.processes[key] != nil {
		return nil, fmt.Errorf("process %q of container %q: %w", execID, containerID, errdefs.ErrAlreadyExists)
	}
	ctx, kill := context.WithCancelCause(p.context())
	proc := &Process{
		ContainerID: containerID, ExecID: execID,
		Signals: make(chan uint32, 16),
		kill:    kill,
		started: make(chan struct{}),
		ended:   make(chan struct{}),
	}
	for _, ends := range [][2]**os.File{{&proc.Stdin, &proc.stdin}, {&proc.stdout, &proc.Stdout}, {&proc.stderr, &proc.Stderr}} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		*ends[0], *ends[1] = r, w
		p.pipes = append(p.pipes, r, w)
	}
	p.processes[key] = proc
	p.jobs.Go(func() { proc.run(ctx, p.opts.Program) })
	return proc, nil
}

func (proc *Process) run(ctx context.Context, program func(context.Context, *Process) int) {
	if program == nil {
		program = func(ctx context.Context, _ *Process) int {
			<-ctx.Done()
			return 0
		}
	}
	stop := context.AfterFunc(ctx, proc.closeStdio) // a program that is killed does not block
	defer stop()
	select {
	case <-proc.started:
		proc.code = int32(program(ctx, proc))
	case <-ctx.Done():
	}
	if k := killed(0); errors.As(context.Cause(ctx), &k) {
		proc.code = 128 + int32(k)
	}
	proc.closeStdio()
	close(proc.ended)
	proc.kill(nil)
}

func (proc *Process) closeStdio() {
	_ = proc.Stdin.Close()
	_ = proc.Stdout.Close()
	_ = proc.Stderr.Close()
}

func (proc *Process) signal(n uint32) {
	switch syscall.Signal(n) {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT:
		proc.kill(killed(n))
	default:
		select {
		case proc.Signals <- n:
		default:
		}
	}
}

// find gives the process, as NOT_FOUND says it is gone.
func (p *Peer) find(containerID, execID string) (*Process, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if proc := p.processes[[2]string{containerID, execID}]; proc != nil {
		return proc, nil
	}
	return nil, fmt.Errorf("process %q of container %q: %w", execID, containerID, errdefs.ErrNotFound)
}

func (p *Peer) all(containerID string) (all []*Process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, proc := range p.processes {
		if key[0] == containerID {
			all = append(all, proc)
		}
	}
	return all
}

func (p *Peer) remove(proc *Process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.processes, [2]string{proc.ContainerID, proc.ExecID})
}

func (p *Peer) handleProcesses() {
	Handle(p, "CreateContainer", func(_ context.Context, req *protocol.CreateContainerRequest) (*emptypb.Empty, error) {
		proc, err := p.add(req.GetContainerId(), req.GetExecId())
		if err == nil {
			proc.Create = req
		}
		return &emptypb.Empty{}, err
	})
	Handle(p, "StartContainer", func(_ context.Context, req *protocol.StartContainerRequest) (*emptypb.Empty, error) {
		proc, err := p.find(req.GetContainerId(), req.GetContainerId())
		if err == nil {
			proc.startOnce.Do(func() { close(proc.started) })
		}
		return &emptypb.Empty{}, err
	})
	Handle(p, "ExecProcess", func(_ context.Context, req *protocol.ExecProcessRequest) (*emptypb.Empty, error) {
		proc, err := p.add(req.GetContainerId(), req.GetExecId())
		if err == nil {
			proc.Exec = req
			proc.startOnce.Do(func() { close(proc.started) })
		}
		return &emptypb.Empty{}, err
	})
	Handle(p, "WaitProcess", p.wait)
	Handle(p, "RemoveContainer", func(ctx context.Context, req *protocol.RemoveContainerRequest) (*emptypb.Empty, error) {
		all := p.all(req.GetContainerId())
		if len(all) == 0 {
			return nil, fmt.Errorf("container %q: %w", req.GetContainerId(), errdefs.ErrNotFound)
		}
		for _, proc := range all {
			proc.kill(killed(syscall.SIGKILL))
			p.remove(proc)
		}
		return &emptypb.Empty{}, nil
	})
	Handle(p, "SignalProcess", func(_ context.Context, req *protocol.SignalProcessRequest) (*emptypb.Empty, error) {
		all := req.GetExecId() == "" && req.GetSignal() == uint32(syscall.SIGKILL)
		execID := req.GetExecId()
		if execID == "" {
			execID = req.GetContainerId()
		}
		return p.deliver(req.GetContainerId(), execID, req.GetSignal(), all)
	})
	Handle(p, "Signal", func(_ context.Context, req *extension.SignalRequest) (*emptypb.Empty, error) {
		return p.deliver(req.GetContainerId(), req.GetExecId(), req.GetSignal(), req.GetAll())
	})
	Handle(p, "Pids", func(_ context.Context, req *extension.PidsRequest) (*extension.PidsResponse, error) {
		answer := &extension.PidsResponse{}
		for i, proc := range p.all(req.GetContainerId()) {
			answer.Processes = append(answer.Processes, &extension.ProcessInfo{Pid: uint32(100 + i), ExecId: proc.ExecID})
		}
		return answer, nil
	})
	p.handleStdio()
}

func (p *Peer) deliver(containerID, execID string, signal uint32, all bool) (*emptypb.Empty, error) {
	if all {
		for _, proc := range p.all(containerID) {
			proc.signal(signal)
		}
		return &emptypb.Empty{}, nil
	}
	proc, err := p.find(containerID, execID)
	if err == nil {
		proc.signal(signal)
	}
	return &emptypb.Empty{}, err
}

// wait answers when the process has ended, and forgets it then.
func (p *Peer) wait(ctx context.Context, req *protocol.WaitProcessRequest) (*protocol.WaitProcessResponse, error) {
	proc, err := p.find(req.GetContainerId(), req.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-proc.ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-p.context().Done():
		return nil, p.context().Err()
	}
	p.remove(proc)
	return &protocol.WaitProcessResponse{Status: proc.code, OomKilled: proc.OOMKilled && !p.opts.Plain}, nil
}
