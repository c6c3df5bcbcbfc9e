package agent

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

var errCause = errors.New("qemu was killed")

func TestConnectionIsMadeOnce(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	if n := peer.Connections(extension.AgentPort); n != 0 {
		t.Errorf("got %d connections before the first call", n)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := c.Check(within(t, 10*time.Second)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := peer.Connections(extension.AgentPort); n != 1 || !c.LongLiveConn() {
		t.Errorf("got %d connections, want 1", n)
	}
}

func TestDialPerCall(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer, func(s *Settings) { s.DialPerCall = true })
	for range 3 {
		if err := c.Check(within(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if n := peer.Connections(extension.AgentPort); n != 3 || c.LongLiveConn() {
		t.Errorf("got %d connections, want 3", n)
	}
}

func TestRedialAfterTheConnectionBroke(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)
	if err := c.Check(ctx); err != nil {
		t.Fatal(err)
	}
	blocked := make(chan error, 1)
	go func() {
		_, err := c.OOMEvent(ctx)
		blocked <- err
	}()
	for len(peer.Calls("GetOOMEvent")) == 0 {
		time.Sleep(time.Millisecond)
	}
	peer.Drop(extension.AgentPort)
	wantUnavailable(t, <-blocked, "closed by the guest")
	if err := c.Check(ctx); err != nil {
		t.Errorf("after the drop: %v", err)
	}
	if n := peer.Connections(extension.AgentPort); n != 2 {
		t.Errorf("got %d connections, want 2", n)
	}
}

func TestDialFails(t *testing.T) {
	refused := errors.New("connection refused")
	attempts := 0
	c := New(Settings{Dial: func(context.Context, uint32) (net.Conn, error) {
		attempts++
		return nil, refused
	}})
	for range 2 {
		err := c.Check(within(t, 10*time.Second))
		wantUnavailable(t, err, "dial port 1024")
		wantClass(t, err, refused)
	}
	if attempts != 2 {
		t.Errorf("got %d attempts, want one per call", attempts)
	}
	wantClass(t, New(Settings{}).Check(t.Context()), errdefs.ErrFailedPrecondition)
}

// hangingDial hangs until its context ends, and counts.
func hangingDial(started chan<- struct{}) func(context.Context, uint32) (net.Conn, error) {
	return func(ctx context.Context, _ uint32) (net.Conn, error) {
		started <- struct{}{}
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
}

func TestDialHangs(t *testing.T) {
	for _, perCall := range []bool{false, true} {
		started := make(chan struct{}, 10)
		c := New(Settings{Dial: hangingDial(started), DialPerCall: perCall})
		wantClass(t, c.Check(within(t, 50*time.Millisecond)), context.DeadlineExceeded)
		blocked := make(chan error, 1)
		go func() { blocked <- c.Check(within(t, time.Minute)) }()
		<-started
		soon(t, "MarkDead", func() { c.MarkDead(errCause) })
		err := <-blocked
		wantUnavailable(t, err, errCause.Error())
		wantClass(t, err, errCause)
	}
}

func TestRequestTimeout(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	hang := func(ctx context.Context, _ proto.Message) (proto.Message, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	for _, m := range []string{"StartContainer", "WaitProcess", "ReadStdout", "WriteStdin", "GetOOMEvent"} {
		peer.Handle(m, hang)
	}
	c := newClient(t, peer, func(s *Settings) { s.RequestTimeout = 50 * time.Millisecond })
	err := c.StartContainer(t.Context(), "c")
	wantClass(t, err, context.DeadlineExceeded)
	t.Log(err)

	unbounded := map[string]func(context.Context) error{
		"WaitProcess": func(ctx context.Context) error { _, err := c.WaitProcess(ctx, "c", ""); return err },
		"ReadProcessStdout": func(ctx context.Context) error {
			_, err := c.ReadProcessStdout(ctx, "c", "", make([]byte, 1))
			return err
		},
		"WriteProcessStdin": func(ctx context.Context) error { _, err := c.WriteProcessStdin(ctx, "c", "", []byte("x")); return err },
		"OOMEvent":          func(ctx context.Context) error { _, err := c.OOMEvent(ctx); return err },
	}
	ctx, cancel := context.WithCancel(t.Context())
	results := make(chan error, len(unbounded))
	for _, f := range unbounded {
		go func() { results <- f(ctx) }()
	}
	select {
	case err := <-results:
		t.Errorf("an unbounded call ended: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	cancel()
	for range unbounded {
		wantClass(t, <-results, context.Canceled)
	}
}

// A call ends with its context, whatever the guest does; an answer that comes
// later disturbs nobody.
func TestLateAnswer(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	release := make(chan struct{})
	peer.Handle("StartContainer", func(context.Context, proto.Message) (proto.Message, error) {
		<-release
		return empty, nil
	})
	c := newClient(t, peer)
	wantClass(t, c.StartContainer(within(t, 50*time.Millisecond), "c"), context.DeadlineExceeded)
	close(release)
	for range 3 {
		if err := c.Check(within(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	if n := peer.Connections(extension.AgentPort); n != 1 {
		t.Errorf("got %d connections, want 1", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	calls := len(peer.Calls())
	wantClass(t, c.Check(ctx), context.Canceled)
	if len(peer.Calls()) != calls {
		t.Error("a call with a context that has ended was sent")
	}
}

// blockedCalls are calls that the guest does not answer.
func blockedCalls(t *testing.T, c *Client) (results chan error, n int) {
	t.Helper()
	ctx := within(t, time.Minute)
	calls := []func() error{
		func() error { return c.StartContainer(ctx, "c") },
		func() error { _, err := c.WaitProcess(ctx, "c", ""); return err },
		func() error { _, err := c.WaitProcess(ctx, "c", ""); return err },
		func() error { _, err := c.OOMEvent(ctx); return err },
		func() error { _, err := c.ReadProcessStdout(ctx, "c", "", make([]byte, 1)); return err },
		func() error { _, err := c.WriteProcessStdin(ctx, "c", "", []byte("x")); return err },
	}
	results = make(chan error, len(calls))
	for _, f := range calls {
		go func() { results <- f() }()
	}
	return results, len(calls)
}

func TestMarkDead(t *testing.T) {
	for _, perCall := range []bool{false, true} {
		asked := make(chan struct{}, 10)
		dial := agenttest.Serve(t, func(_ uint32, conn net.Conn) { // never answers
			for {
				if _, err := agenttest.ReadFrame(conn); err != nil {
					return
				}
				asked <- struct{}{}
			}
		})
		c := clientOf(t, Settings{Dial: dial, DialPerCall: perCall})
		results, n := blockedCalls(t, c)
		for range n - 1 { // the waits share one
			<-asked
		}
		soon(t, "MarkDead", func() { c.MarkDead(errCause) })
		for range n {
			err := <-results
			wantUnavailable(t, err, "guest is gone")
			wantClass(t, err, errCause)
		}
		started := time.Now()
		results, n = blockedCalls(t, c)
		for range n {
			wantClass(t, <-results, errCause)
		}
		_, err := c.Streams(t.Context(), "c", "", StreamSet{Stdout: true})
		wantClass(t, err, errCause)
		if d := time.Since(started); d > 5*time.Second {
			t.Errorf("calls on a dead guest took %v", d)
		}
		c.MarkDead(errors.New("second"))
		wantClass(t, c.Check(t.Context()), errCause)
		c.MarkDead(nil)
	}
}

func TestDisconnect(t *testing.T) {
	asked := make(chan struct{}, 10)
	peer := agenttest.Start(t, agenttest.Options{})
	hang := func(ctx context.Context, _ proto.Message) (proto.Message, error) {
		asked <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	for _, m := range []string{"StartContainer", "WaitProcess", "ReadStdout", "WriteStdin", "GetOOMEvent"} {
		peer.Handle(m, hang)
	}
	c := newClient(t, peer)
	results, n := blockedCalls(t, c)
	for range n - 1 {
		<-asked
	}
	soon(t, "Disconnect", func() {
		_ = c.Disconnect()
		_ = c.Disconnect()
	})
	for range n {
		wantUnavailable(t, <-results, "disconnected")
	}
	if err := c.Check(within(t, 10*time.Second)); err != nil {
		t.Errorf("after a disconnect: %v", err)
	}
}

func TestReuseAgent(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{Program: func(context.Context, *agenttest.Process) int { return 3 }})
	old := newClient(t, peer, func(s *Settings) { s.URL = "vsock://3:1024" })
	ctx := within(t, 10*time.Second)
	if err := old.CreateContainer(ctx, &protocol.CreateContainerRequest{ContainerId: "c", ExecId: "c"}); err != nil {
		t.Fatal(err)
	}
	early := make(chan error, 1)
	go func() {
		_, err := old.WaitProcess(ctx, "c", "")
		early <- err
	}()
	for len(peer.Calls("WaitProcess")) == 0 {
		time.Sleep(time.Millisecond)
	}

	other := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, other, func(s *Settings) { s.RequestTimeout = time.Hour })
	if err := c.Check(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.ReuseAgent(old); err != nil {
		t.Fatal(err)
	}
	if err := c.StartContainer(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	if err := <-early; err != nil {
		t.Errorf("a wait that began on the old client: %v", err)
	}
	if exit, err := c.WaitProcess(ctx, "c", ""); err != nil || exit.Code != 3 {
		t.Errorf("got %+v, %v", exit, err)
	}
	if n := peer.Connections(extension.AgentPort); n != 1 {
		t.Errorf("got %d connections, want 1: no redial", n)
	}
	if url, err := c.AgentURL(); url != "vsock://3:1024" || err != nil {
		t.Errorf("got URL %q, %v", url, err)
	}
	if s := c.peer.Load().current(); s.RequestTimeout != time.Hour {
		t.Errorf("got timeout %v of the other client", s.RequestTimeout)
	}
	if err := old.Check(ctx); err != nil {
		t.Errorf("old client: %v", err)
	}
	if n := peer.Connections(extension.AgentPort); n != 2 {
		t.Errorf("got %d connections, want 2: the old client has one of its own", n)
	}
	if err := c.ReuseAgent(c); err != nil {
		t.Error(err)
	}
	wantClass(t, c.ReuseAgent(nil), errdefs.ErrInvalidArgument)
}

func TestConfigure(t *testing.T) {
	first, second := agenttest.Start(t, agenttest.Options{}), agenttest.Start(t, agenttest.Options{})
	ctx := within(t, 10*time.Second)
	c := newClient(t, first)
	if err := c.Check(ctx); err != nil {
		t.Fatal(err)
	}
	keep, err := c.Init(ctx, Settings{Dial: second.Dial, Tracing: true})
	if err != nil || !keep {
		t.Errorf("got %v, %v", keep, err)
	}
	if err := c.Check(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.ConfigureFromRPC(ctx, Settings{RequestTimeout: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if err := c.Check(ctx); err != nil {
		t.Fatal(err)
	}
	if a, b := first.Connections(extension.AgentPort), second.Connections(extension.AgentPort); a != 1 || b != 1 {
		t.Errorf("got %d and %d connections, want 1 and 1", a, b)
	}
	if err := c.CreateSandbox(ctx); err != nil {
		t.Error(err)
	}
	wantClass(t, New(Settings{}).CreateSandbox(ctx), errdefs.ErrFailedPrecondition)
	if err := c.Cleanup(ctx); err != nil {
		t.Error(err)
	}
}
