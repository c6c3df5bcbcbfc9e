package sandbox

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func TestRootMachineDies(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	c := e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := c.Exec(t.Context(), ExecConfig{ID: "e1", Process: testSpec().Process})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = e.machine().cmd.Process.Kill()
	ended(t, "sandbox", s.Done())
	for _, p := range []*Process{p, c.Init()} {
		ended(t, "process", p.Done())
		if got := p.Exit(); got.Code != 137 || got.ExitedAt.IsZero() {
			t.Errorf("exit %+v", got)
		}
	}
	fails(t, s.Err(), errdefs.ErrUnavailable, "last words")
	_, err = s.CreateContainer(t.Context(), e.config("c2"))
	fails(t, err, errdefs.ErrUnavailable, "last words")
	_, err = c.Stats(t.Context())
	fails(t, err, nil)
	if pids, err := c.Pids(t.Context()); err != nil || len(pids) != 1 || int(pids[0].GetPid()) != c.PID() {
		t.Errorf("pids %v %v", pids, err)
	}
	if err := p.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	if err := c.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRootMachineDiesInCreate(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	agenttest.Handle(e.peer, "CreateContainer", func(ctx context.Context, _ *protocol.CreateContainerRequest) (*emptypb.Empty, error) {
		_ = e.machine().cmd.Process.Kill()
		<-s.Done()
		return nil, errors.New("too late")
	})
	_, err := s.CreateContainer(t.Context(), e.config("c1"))
	fails(t, err, errdefs.ErrUnavailable, "last words")
	if ids := s.Containers(); len(ids) > 0 {
		t.Errorf("containers %v", ids)
	}
}

func TestRootMachineDiesInBoot(t *testing.T) {
	e := newEnv(t)
	e.silent = true
	s := e.sandbox()
	e.point = func(what string) {
		if what == "machine started" {
			_ = e.machine().cmd.Process.Kill()
		}
	}
	var g errgroup.Group
	var created error
	g.Go(func() error { _, created = s.CreateContainer(t.Context(), e.config("c1")); return nil })
	err := s.Start(t.Context(), testSpec())
	_ = g.Wait()
	fails(t, err, errdefs.ErrUnavailable, "last words")
	fails(t, created, errdefs.ErrUnavailable, "last words")
	ended(t, "sandbox", s.Done())
	fails(t, s.Err(), errdefs.ErrUnavailable)
	e.clean()
	if err := s.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRootAgentNeverAnswers(t *testing.T) {
	e := newEnv(t)
	e.silent = true
	e.opts.Config.StartTimeout = 200 * time.Millisecond
	s := e.sandbox()
	err := s.Start(t.Context(), testSpec())
	fails(t, err, context.DeadlineExceeded, "agent", "200ms", "last words")
	e.clean()
}

// TestRootAgentDies cuts the connection for good: the machine is of no use.
func TestRootAgentDies(t *testing.T) {
	t.Parallel()
	e := newEnv(t)
	s := e.running()
	c := e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	agenttest.Handle(e.peer, "Check", func(context.Context, *protocol.CheckRequest) (*protocol.HealthCheckResponse, error) {
		return nil, errdefs.ErrUnavailable
	})
	e.peer.Drop(1024)
	ended(t, "process", c.Init().Done())
	fails(t, s.Err(), errdefs.ErrUnavailable, "does not serve")
}

// TestRootConnectionLost cuts the connection once.
func TestRootConnectionLost(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	c := e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	asked := len(e.peer.Calls("WaitProcess"))
	e.peer.Drop(1024)
	for len(e.peer.Calls("WaitProcess")) == asked { // on a new connection
		time.Sleep(time.Millisecond)
	}
	if err := c.Kill(t.Context(), 9, false); err != nil {
		t.Fatal(err)
	}
	ended(t, "process", c.Init().Done())
	if got := c.Init().Exit().Code; got != 137 {
		t.Errorf("exit code %d", got)
	}
	if err := s.Err(); err != nil {
		t.Error(err)
	}
}

func TestRootOOM(t *testing.T) {
	e := newEnv(t)
	var reports atomic.Int32
	var c *Container
	e.oom = func(id string) {
		select {
		case <-c.Init().Done():
			t.Error("reported after the end")
		default:
		}
		if reports.Add(1); id != "c1" {
			t.Errorf("reported for %q", id)
		}
	}
	e.program = func(p *agenttest.Process) int {
		<-p.Signals
		p.OOMKilled = true
		return 137
	}
	s := e.running()
	c = e.container(s, "c1")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.peer.OOM("nobody")
	e.peer.OOM("c1")
	if err := c.Kill(t.Context(), uint32(syscall.SIGUSR1), false); err != nil {
		t.Fatal(err)
	}
	ended(t, "process", c.Init().Done())
	if !c.Init().Exit().OOMKilled {
		t.Error("the exit does not say so")
	}
	if n := reports.Load(); n != 1 {
		t.Errorf("%d reports", n)
	}
}
