package agent

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// create makes a container with the client, not started.
func create(tb testing.TB, c *Client, id string) {
	tb.Helper()
	if err := c.CreateContainer(within(tb, 10*time.Second), &protocol.CreateContainerRequest{ContainerId: id, ExecId: id}); err != nil {
		tb.Fatal(err)
	}
}

func start(tb testing.TB, c *Client, id string) {
	tb.Helper()
	if err := c.StartContainer(within(tb, 10*time.Second), id); err != nil {
		tb.Fatal(err)
	}
}

func waitsFor(code int32) func(testing.TB, *Client, string) {
	return func(tb testing.TB, c *Client, id string) {
		tb.Helper()
		exit, err := c.WaitProcess(within(tb, 10*time.Second), id, "")
		if err != nil || exit.Code != code {
			tb.Errorf("got %+v, %v, want code %d", exit, err, code)
		}
	}
}

// Several waiters, some of them gone early, and late ones get one status,
// although the guest gives it once.
func TestWaitProcess(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{Program: func(_ context.Context, p *agenttest.Process) int {
		p.OOMKilled = true
		return 7
	}})
	c := newClient(t, peer)
	create(t, c, "c")
	_, err := c.WaitProcess(within(t, 20*time.Millisecond), "c", "c")
	wantClass(t, err, context.DeadlineExceeded)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() { waitsFor(7)(t, c, "c") })
	}
	start(t, c, "c")
	wg.Wait()
	exit, err := c.WaitProcess(within(t, 10*time.Second), "c", "c")
	if err != nil || exit.Code != 7 || !exit.OOMKilled || time.Since(exit.ExitedAt) > time.Minute {
		t.Errorf("got %+v, %v", exit, err)
	}
	if n := len(peer.Calls("WaitProcess")); n != 1 {
		t.Errorf("got %d calls, want 1", n)
	}

	c.MarkDead(errCause) // what is known stays known
	waitsFor(7)(t, c, "c")
}

// A status is kept until the container is removed, or the process forgotten.
func TestWaitIsForgotten(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{Program: func(context.Context, *agenttest.Process) int { return 1 }})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)
	forget := map[string]func(){
		"ForgetProcess": func() { c.ForgetProcess("c", "") },
		"StopContainer": func() {
			if err := c.StopContainer(ctx, "c"); err != nil {
				t.Error(err)
			}
		},
	}
	for name, f := range forget {
		create(t, c, "c")
		start(t, c, "c")
		waitsFor(1)(t, c, "c")
		f()
		_, err := c.WaitProcess(ctx, "c", "")
		if !errdefs.IsNotFound(err) {
			t.Errorf("after %s: got %v, want not found", name, err)
		}
		// An error is not kept: the id may be used again.
		create(t, c, "c")
		start(t, c, "c")
		waitsFor(1)(t, c, "c")
		c.ForgetProcess("c", "")
	}
}

// A wait that the connection's end cut short is made again by the next caller.
func TestWaitAfterTheConnectionBroke(t *testing.T) {
	for _, plain := range []bool{false, true} {
		peer := agenttest.Start(t, agenttest.Options{Plain: plain})
		c := newClient(t, peer)
		create(t, c, "c")
		start(t, c, "c")
		cut := make(chan error, 1)
		go func() {
			_, err := c.WaitProcess(within(t, time.Minute), "c", "")
			cut <- err
		}()
		for len(peer.Calls("WaitProcess")) == 0 {
			time.Sleep(time.Millisecond)
		}
		peer.Drop(extension.AgentPort)
		wantUnavailable(t, <-cut, "connection lost")
		go func() {
			for len(peer.Calls("WaitProcess")) < 2 {
				time.Sleep(time.Millisecond)
			}
			_ = c.SignalProcess(within(t, 10*time.Second), "c", "", 9, false)
		}()
		waitsFor(137)(t, c, "c")
	}
}
