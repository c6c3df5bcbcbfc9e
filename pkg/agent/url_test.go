package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// hybrid serves a peer as a vhost-user vsock device does: on a unix socket,
// behind a line that names the port.
func hybrid(t *testing.T, peer *agenttest.Peer) (url string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vs")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var jobs sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		jobs.Wait()
	})
	jobs.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			jobs.Go(func() { splice(conn, peer) })
		}
	})
	return "hvsock://" + path + ":1024"
}

func splice(conn net.Conn, peer *agenttest.Peer) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	var port uint32
	if _, err := fmt.Fscanf(r, "CONNECT %d\n", &port); err != nil {
		return
	}
	guest, err := peer.Dial(context.Background(), port)
	if err != nil {
		return
	}
	defer guest.Close()
	fmt.Fprintf(conn, "OK 1073741824\n")
	var both sync.WaitGroup
	both.Go(func() { _, _ = io.Copy(guest, r); _ = guest.Close() })
	both.Go(func() { _, _ = io.Copy(conn, guest); _ = conn.Close() })
	both.Wait()
}

// A second client finds the agent by the first one's URL, and by its state.
func TestAgentURL(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{Program: cat})
	url := hybrid(t, peer)
	ctx := within(t, 10*time.Second)
	first := clientOf(t, Settings{})
	if err := first.SetAgentURL(url); err != nil {
		t.Fatal(err)
	}
	create(t, first, "c")

	got, err := first.AgentURL()
	if got != url || err != nil {
		t.Errorf("got URL %q, %v, want %q", got, err, url)
	}
	second := clientOf(t, Settings{URL: got})
	start(t, second, "c")

	saved, err := first.Save()
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(saved)
	if err != nil {
		t.Fatal(err)
	}
	var state SavedState
	if err := json.Unmarshal(b, &state); err != nil {
		t.Fatal(err)
	}
	third := clientOf(t, Settings{})
	if err := third.Load(state); err != nil {
		t.Fatal(err)
	}
	s := streams(t, third, "c", allStreams)
	fmt.Fprint(s.Stdin, "hello")
	if err := s.Stdin.Close(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(s.Stdout); string(b) != "hello" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	waitsFor(0)(t, third, "c")

	if _, err := third.Init(ctx, Settings{URL: url}); err != nil {
		t.Error(err)
	}
	if err := third.Check(ctx); err != nil {
		t.Error(err)
	}
}

func TestBadAgentURL(t *testing.T) {
	c := clientOf(t, Settings{})
	for _, url := range []string{"", "http://x:1024", "vsock://x", "hvsock://" + strings.Repeat("x", 200) + ":99999999"} {
		wantClass(t, c.SetAgentURL(url), errdefs.ErrInvalidArgument)
		wantClass(t, c.Load(SavedState{URL: url}), errdefs.ErrInvalidArgument)
	}
	_, err := c.Init(t.Context(), Settings{URL: "http://x"})
	wantClass(t, err, errdefs.ErrInvalidArgument)
	_, err = c.AgentURL()
	wantClass(t, err, errdefs.ErrFailedPrecondition)
	if _, err := c.Save(); err == nil {
		t.Error("no error from Save")
	}
	if e := (*Error)(nil); !errors.As(c.StartSandbox(t.Context(), Sandbox{Request: &protocol.CreateSandboxRequest{}}), &e) {
		t.Error("no *Error from a client without an address")
	}
}
