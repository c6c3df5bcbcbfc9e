package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A write waits for a process that does not read; what is asked to end it does.
func TestBlockedStdin(t *testing.T) {
	ends := map[string]func(*Client, *Streams){
		"Streams.Close": func(_ *Client, s *Streams) { _ = s.Close() },
		"MarkDead":      func(c *Client, _ *Streams) { c.MarkDead(errCause) },
		"Disconnect":    func(c *Client, _ *Streams) { _ = c.Disconnect() },
		"ForgetProcess": func(c *Client, _ *Streams) { c.ForgetProcess("c", "") },
		"StopContainer": func(c *Client, _ *Streams) { _ = c.StopContainer(context.Background(), "c") },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			eachPeer(t, nil, func(t *testing.T, _ *agenttest.Peer, c *Client) {
				create(t, c, "c")
				s := streams(t, c, "c", allStreams)
				start(t, c, "c")
				results := make(chan error, 3)
				go func() { _, err := s.Stdin.Write(make([]byte, large)); results <- err }()
				go func() { _, err := s.Stdout.Read(make([]byte, 1)); results <- err }()
				go func() { _, err := s.Stderr.Read(make([]byte, 1)); results <- err }()
				select {
				case err := <-results:
					t.Errorf("got %v before the end", err)
				case <-time.After(100 * time.Millisecond):
				}
				soon(t, name, func() { end(c, s) })
				for range 3 {
					soon(t, "blocked stream", func() {
						if err := <-results; err == nil {
							t.Error("a stream that was cut gave no error")
						}
					})
				}
			})
		})
	}
}

// Close is the end of input behind a write that is still going on, even when
// that takes longer than Close itself.
func TestCloseStdinBehindAWrite(t *testing.T) {
	release := make(chan struct{})
	program := func(_ context.Context, p *agenttest.Process) int {
		<-release
		n, err := io.Copy(io.Discard, p.Stdin)
		if n != 1<<20 || err != nil {
			return 1
		}
		return 0
	}
	eachPeer(t, program, func(t *testing.T, _ *agenttest.Peer, c *Client) {
		create(t, c, "c")
		s := streams(t, c, "c", StreamSet{Stdin: true})
		start(t, c, "c")
		written := make(chan error, 1)
		go func() { _, err := s.Stdin.Write(make([]byte, 1<<20)); written <- err }()
		time.Sleep(50 * time.Millisecond)
		started := time.Now()
		if err := s.Stdin.Close(); err != nil {
			t.Error(err)
		}
		if d := time.Since(started); d > 5*closeWait {
			t.Errorf("Close took %v", d)
		}
		release <- struct{}{}
		if err := <-written; err != nil {
			t.Error(err)
		}
		waitsFor(0)(t, c, "c")
	})
}

// The end is not sent while a write is going on.
func TestStdinKeepsTheOrder(t *testing.T) {
	l := newLife(newPeer(Settings{}))
	down, writing, release := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var order []string
	s := newStdin(l, down, func(b []byte) (int, error) {
		close(writing)
		<-release
		order = append(order, "write")
		return len(b), nil
	}, func() error {
		order = append(order, "end")
		return nil
	})
	go func() { _, _ = s.Write([]byte("x")) }()
	<-writing
	if err := s.Close(); err != nil { // in its own time
		t.Error(err)
	}
	close(release)
	<-s.over
	if fmt.Sprint(order) != "[write end]" {
		t.Errorf("got %v", order)
	}
	if _, err := s.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("got %v", err)
	}
	l.jobs.Wait()
}

// unreadStdin is a stdin and the guest's end of its connection, which nobody reads.
func unreadStdin(t *testing.T) (*Streams, net.Conn) {
	t.Helper()
	guest := make(chan net.Conn, 1)
	done := make(chan struct{})
	c := streamScript(t, func(conn net.Conn) {
		_ = extension.WriteStreamAnswer(conn, extension.StreamOK, "")
		guest <- conn
		<-done
	})
	t.Cleanup(func() { close(done) }) // before the peer waits for its script
	return streams(t, c, "c", StreamSet{Stdin: true}), <-guest
}

// No more of stdin is under way than the guest has room for; receipts make room.
func TestStdinWindow(t *testing.T) {
	s, conn := unreadStdin(t)
	written := make(chan error, 1)
	go func() { _, err := s.Stdin.Write(make([]byte, large)); written <- err }()

	chunks := &extension.ChunkReader{R: conn}
	come := func(n int) {
		t.Helper()
		if _, err := io.ReadFull(chunks, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := chunks.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("%d bytes more came, %v", n, err)
		}
		_ = conn.SetReadDeadline(time.Time{})
	}
	receipt := func(n uint32) {
		t.Helper()
		if err := binary.Write(conn, binary.BigEndian, n); err != nil {
			t.Fatal(err)
		}
	}
	const chunk = extension.ChunkHead + extension.MaxChunk
	come(2 * extension.MaxChunk)
	receipt(chunk)
	come(extension.MaxChunk)
	receipt(chunk - 1) // a whole chunk has no room yet
	come(0)
	receipt(1)
	come(extension.MaxChunk)

	receipt(extension.Window)
	receipt(extension.Window) // there can't be as much
	soon(t, "write", func() { wantUnavailable(t, <-written, "receipt for what was not sent") })
}

// What little inputs take of the window is their lengths above all.
func TestStdinWindowOfBytes(t *testing.T) {
	const chunk = extension.ChunkHead + 1
	s, conn := unreadStdin(t)
	go func() { // ends with the stream
		for {
			if _, err := s.Stdin.Write(make([]byte, 1)); err != nil {
				return
			}
		}
	}()
	want := extension.Window / chunk * chunk
	if _, err := io.ReadFull(conn, make([]byte, want)); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d bytes came after %d, %v", n, want, err)
	}
}

// The end of input for a process that is gone is no error.
func TestCloseStdinOfAGuestThatClosed(t *testing.T) {
	for range 20 {
		c := streamScript(t, func(conn net.Conn) { _ = extension.WriteStreamAnswer(conn, extension.StreamOK, "") })
		s := streams(t, c, "c", StreamSet{Stdin: true})
		if err := s.Stdin.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A writer learns that nobody reads any more.
func TestStdinOfAnEndedProcess(t *testing.T) {
	eachPeer(t, func(context.Context, *agenttest.Process) int { return 0 }, func(t *testing.T, _ *agenttest.Peer, c *Client) {
		create(t, c, "c")
		s := streams(t, c, "c", StreamSet{Stdin: true})
		start(t, c, "c")
		waitsFor(0)(t, c, "c")
		var err error
		for range 1000 {
			if _, err = s.Stdin.Write(make([]byte, 1<<16)); err != nil {
				break
			}
		}
		if err == nil {
			t.Error("64 MiB went to nobody")
		}
		if err := s.Stdin.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

// What is written after a write that its caller left comes after it.
func TestCancelledWriteKeepsTheOrder(t *testing.T) {
	release := make(chan struct{})
	got := make(chan string, 1)
	peer := agenttest.Start(t, agenttest.Options{Plain: true, Program: func(_ context.Context, p *agenttest.Process) int {
		<-release
		b, _ := io.ReadAll(p.Stdin)
		got <- string(b)
		return 0
	}})
	c := newClient(t, peer)
	create(t, c, "c")
	start(t, c, "c")
	if _, err := c.WriteProcessStdin(within(t, 10*time.Second), "c", "", bytes.Repeat([]byte("a"), 1<<16)); err != nil {
		t.Fatal(err) // fits the pipe
	}
	data := []byte("b")
	_, err := c.WriteProcessStdin(within(t, 20*time.Millisecond), "c", "", data)
	wantClass(t, err, context.DeadlineExceeded)
	data[0] = 'x' // it is the caller's again
	wantClass(t, c.CloseProcessStdin(within(t, 20*time.Millisecond), "c", ""), context.DeadlineExceeded)
	close(release)
	if _, err := c.WriteProcessStdin(within(t, 10*time.Second), "c", "", []byte("c")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseProcessStdin(within(t, 10*time.Second), "c", ""); err != nil {
		t.Fatal(err)
	}
	if s := strings.TrimLeft(<-got, "a"); s != "bc" {
		t.Errorf("got %q, want \"bc\"", s)
	}
}
