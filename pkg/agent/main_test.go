package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
)

// TestMain fails when a test leaves goroutines of this package or of ttrpc behind.
func TestMain(m *testing.M) {
	_ = log.SetLevel("panic") // ttrpc logs what the tests provoke
	code := m.Run()
	if code == 0 {
		if left := leaked(5 * time.Second); left != "" {
			fmt.Fprintln(os.Stderr, "goroutines left:\n"+left)
			code = 1
		}
	}
	os.Exit(code)
}

func leaked(patience time.Duration) (left string) {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		var b strings.Builder
		_ = pprof.Lookup("goroutine").WriteTo(&b, 2)
		left = ""
		for g := range strings.SplitSeq(b.String(), "\n\n") {
			if (strings.Contains(g, "vmshim/pkg/agent") || strings.Contains(g, "containerd/ttrpc")) && !strings.Contains(g, "TestMain") {
				left += g + "\n\n"
			}
		}
		if left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

// newClient is a client of a peer, which is disconnected when the test ends.
func newClient(tb testing.TB, peer *agenttest.Peer, change ...func(*Settings)) *Client {
	tb.Helper()
	return clientOf(tb, Settings{Dial: peer.Dial}, change...)
}

func clientOf(tb testing.TB, s Settings, change ...func(*Settings)) *Client {
	tb.Helper()
	for _, f := range change {
		f(&s)
	}
	c := New(s)
	tb.Cleanup(func() { _ = c.Disconnect() })
	return c
}

// within is a context that ends long before a test's own limit.
func within(tb testing.TB, d time.Duration) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), d)
	tb.Cleanup(cancel)
	return ctx
}

// soon fails the test when f takes longer than a few seconds.
func soon(tb testing.TB, what string, f func()) {
	tb.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		tb.Fatalf("%s: still blocked after 10 s", what)
	}
}

func wantClass(tb testing.TB, err, class error) {
	tb.Helper()
	if !errors.Is(err, class) {
		tb.Errorf("got error %v, want one of class %v", err, class)
	}
}

func wantUnavailable(tb testing.TB, err error, text string) {
	tb.Helper()
	wantClass(tb, err, errdefs.ErrUnavailable)
	if err != nil && !strings.Contains(err.Error(), text) {
		tb.Errorf("got error %q, want %q in it", err, text)
	}
}
