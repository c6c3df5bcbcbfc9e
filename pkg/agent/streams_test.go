package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const large = 20 << 20

var allStreams = StreamSet{Stdin: true, Stdout: true, Stderr: true}

// eachPeer runs a test against a peer with byte streams and a plain one.
func eachPeer(t *testing.T, program func(context.Context, *agenttest.Process) int, test func(*testing.T, *agenttest.Peer, *Client)) {
	t.Helper()
	for name, plain := range map[string]bool{"byte streams": false, "plain": true} {
		t.Run(name, func(t *testing.T) {
			peer := agenttest.Start(t, agenttest.Options{Plain: plain, Program: program})
			test(t, peer, newClient(t, peer))
		})
	}
}

func streams(tb testing.TB, c *Client, id string, want StreamSet) *Streams {
	tb.Helper()
	s, err := c.Streams(within(tb, 10*time.Second), id, "", want)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
	return b
}

// cat copies stdin to stdout, and a line to stderr.
func cat(_ context.Context, p *agenttest.Process) int {
	n, err := io.Copy(p.Stdout, p.Stdin)
	if err != nil {
		return 1
	}
	fmt.Fprintf(p.Stderr, "%d bytes", n)
	return 0
}

// 20 MiB go both ways at once, and nothing is lost.
func TestStreams(t *testing.T) {
	data := random(large)
	eachPeer(t, cat, func(t *testing.T, _ *agenttest.Peer, c *Client) {
		create(t, c, "c")
		s := streams(t, c, "c", allStreams)
		start(t, c, "c")
		exit := make(chan ExitStatus, 1)
		go func() {
			e, err := c.WaitProcess(within(t, time.Minute), "c", "")
			if err != nil {
				t.Error(err)
			}
			exit <- e
		}()
		var wg sync.WaitGroup
		wg.Go(func() {
			if n, err := io.Copy(s.Stdin, struct{ io.Reader }{bytes.NewReader(data)}); n != large || err != nil {
				t.Errorf("stdin: %d bytes, %v", n, err)
			}
			if err := s.Stdin.Close(); err != nil {
				t.Errorf("close stdin: %v", err)
			}
		})
		wg.Go(func() {
			h := crc32.NewIEEE()
			if n, err := io.Copy(h, s.Stdout); n != large || err != nil || h.Sum32() != crc32.ChecksumIEEE(data) {
				t.Errorf("stdout: %d bytes, crc %x, %v", n, h.Sum32(), err)
			}
		})
		wg.Go(func() {
			if b, err := io.ReadAll(s.Stderr); string(b) != fmt.Sprintf("%d bytes", large) || err != nil {
				t.Errorf("stderr: %q, %v", b, err)
			}
		})
		wg.Wait()
		if e := <-exit; e.Code != 0 {
			t.Errorf("got exit %+v", e)
		}
		if n, err := s.Stdout.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %d, %v", n, err)
		}
		if _, err := s.Stdin.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("write after close: %v", err)
		}
	})
}

// The output of a process that ends at once is whole, however late it is read
// and although somebody waits for the exit.
func TestOutputOfAShortProcess(t *testing.T) {
	program := func(_ context.Context, p *agenttest.Process) int {
		fmt.Fprint(p.Stdout, strings.Repeat("o", 60000))
		fmt.Fprint(p.Stderr, "e")
		return 5
	}
	eachPeer(t, program, func(t *testing.T, _ *agenttest.Peer, c *Client) {
		create(t, c, "c")
		s := streams(t, c, "c", StreamSet{Stdout: true, Stderr: true})
		if s.Stdin != nil {
			t.Error("got a stdin that was not asked for")
		}
		start(t, c, "c")
		exit := make(chan error, 1)
		go func() {
			_, err := c.WaitProcess(within(t, 10*time.Second), "c", "")
			exit <- err
		}()
		time.Sleep(50 * time.Millisecond)
		for name, tt := range map[string]struct {
			r    io.Reader
			want int
		}{"stdout": {s.Stdout, 60000}, "stderr": {s.Stderr, 1}} {
			if b, err := io.ReadAll(tt.r); len(b) != tt.want || err != nil {
				t.Errorf("%s: got %d bytes, %v", name, len(b), err)
			}
		}
		if err := <-exit; err != nil {
			t.Error(err)
		}
	})
}

// The connection of an output is closed as soon as the end was read: that is
// how the guest knows that everything was taken.
func TestEndOfOutputIsAcknowledged(t *testing.T) {
	acknowledged := make(chan error, 1)
	c := streamScript(t, func(conn net.Conn) {
		_ = extension.WriteStreamAnswer(conn, extension.StreamOK, "")
		_ = extension.WriteEnd(conn)
		_, err := conn.Read(make([]byte, 1))
		acknowledged <- err
	})
	s := streams(t, c, "c", StreamSet{Stdout: true})
	select {
	case err := <-acknowledged:
		t.Errorf("closed before the end was read: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if b, err := io.ReadAll(s.Stdout); len(b) != 0 || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	soon(t, "acknowledgement", func() {
		if err := <-acknowledged; !errors.Is(err, io.EOF) {
			t.Errorf("got %v", err)
		}
	})
}

func TestCloseOutput(t *testing.T) {
	eachPeer(t, nil, func(t *testing.T, _ *agenttest.Peer, c *Client) {
		create(t, c, "c")
		s := streams(t, c, "c", StreamSet{Stdout: true})
		_ = s.Stdout.Close()
		_, err := s.Stdout.Read(make([]byte, 1))
		if !errors.Is(err, errClosed) || errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("got %v", err)
		}
		_ = s.Close()
	})
}

func TestStreamRefused(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)
	_, err := c.Streams(ctx, "never there", "", allStreams)
	wantClass(t, err, errdefs.ErrNotFound)
	create(t, c, "c")
	_ = streams(t, c, "c", StreamSet{Stdout: true})
	_, err = c.Streams(ctx, "c", "", StreamSet{Stdout: true})
	wantClass(t, err, errdefs.ErrAlreadyExists)
	_, err = c.Streams(ctx, "c", strings.Repeat("x", extension.MaxID+1), StreamSet{Stdout: true})
	wantClass(t, err, errdefs.ErrInvalidArgument)
	if n := peer.Connections(extension.StreamPort); n < 5 {
		t.Errorf("got %d connections, want one per stream", n)
	}
}

// streamScript is a peer with byte streams whose streams are served by f,
// after the header was read.
func streamScript(t *testing.T, f func(net.Conn)) *Client {
	t.Helper()
	peer := agenttest.Start(t, agenttest.Options{})
	scripted := agenttest.Serve(t, func(_ uint32, conn net.Conn) {
		if _, err := extension.ReadStreamHeader(conn); err == nil {
			f(conn)
		}
	})
	return clientOf(t, Settings{RequestTimeout: 200 * time.Millisecond, Dial: func(ctx context.Context, port uint32) (net.Conn, error) {
		if port == extension.StreamPort {
			return scripted(ctx, port)
		}
		return peer.Dial(ctx, port)
	}})
}

func TestHostileHandshake(t *testing.T) {
	hang := func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }
	for _, tt := range []struct {
		name  string
		serve func(net.Conn)
		class error
		want  string
	}{
		{"silence", hang, context.DeadlineExceeded, "no answer"},
		{"close", func(net.Conn) {}, errdefs.ErrUnavailable, "closed by the guest"},
		{"half an answer", func(c net.Conn) { _, _ = c.Write([]byte{0, 0}) }, errdefs.ErrUnavailable, "connection lost"},
		{"unknown answer", func(c net.Conn) { _, _ = c.Write([]byte{99, 0, 0}); hang(c) }, errdefs.ErrUnavailable, "answer 99"},
		{"long text", func(c net.Conn) { _, _ = c.Write([]byte{1, 0xff, 0xff}); hang(c) }, errdefs.ErrUnavailable, "at most 512"},
		{"quoted", func(c net.Conn) { _ = extension.WriteStreamAnswer(c, extension.StreamInvalid, "\x1b[1m") }, errdefs.ErrInvalidArgument, `"\x1b[1m"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := streamScript(t, tt.serve)
			started := time.Now()
			_, err := c.Streams(t.Context(), "c", "", StreamSet{Stdout: true})
			wantClass(t, err, tt.class)
			if err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, want %q in it", err, tt.want)
			}
			if d := time.Since(started); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

// An output that ends without its mark was cut, and says so.
func TestCutOutput(t *testing.T) {
	for _, tt := range []struct {
		name string
		send string
		want string
	}{
		{"between chunks", "\x00\x00\x00\x02ab", "ab"},
		{"in a chunk", "\x00\x00\x00\x04ab", "ab"},
		{"in a length", "\x00\x00\x00\x02ab\x00\x00", "ab"},
		{"oversized chunk", "\x00\x00\x00\x02ab\x00\x04\x00\x01", "ab"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := streamScript(t, func(conn net.Conn) {
				_ = extension.WriteStreamAnswer(conn, extension.StreamOK, "")
				_, _ = conn.Write([]byte(tt.send))
			})
			s := streams(t, c, "c", StreamSet{Stdout: true})
			got, err := io.ReadAll(s.Stdout)
			if string(got) != tt.want || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	t.Run("plain", func(t *testing.T) {
		peer := agenttest.Start(t, agenttest.Options{Plain: true})
		c := newClient(t, peer)
		create(t, c, "c")
		s := streams(t, c, "c", StreamSet{Stdout: true})
		got := make(chan error, 1)
		go func() { _, err := io.ReadAll(s.Stdout); got <- err }()
		for len(peer.Calls("ReadStdout")) == 0 {
			time.Sleep(time.Millisecond)
		}
		peer.Drop(extension.AgentPort)
		wantClass(t, <-got, io.ErrUnexpectedEOF)
	})
}

// A plain read whose caller left keeps what it brings for the next one.
func TestCancelledReadLosesNothing(t *testing.T) {
	for name, plain := range map[string]bool{"byte streams": false, "plain": true} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			peer := agenttest.Start(t, agenttest.Options{Plain: plain, Program: func(_ context.Context, p *agenttest.Process) int {
				for i := range 20 {
					<-release
					fmt.Fprintf(p.Stdout, "%d,", i)
				}
				return 0
			}})
			c := newClient(t, peer)
			create(t, c, "c")
			start(t, c, "c")
			var got []byte
			for range 20 {
				buf := make([]byte, 2)
				_, err := c.ReadProcessStdout(within(t, 5*time.Millisecond), "c", "", buf)
				wantClass(t, err, context.DeadlineExceeded)
				release <- struct{}{}
				n, err := c.ReadProcessStdout(within(t, 10*time.Second), "c", "", buf)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, buf[:n]...)
				for got[len(got)-1] != ',' { // what the buffer had no room for
					n, err := c.ReadProcessStdout(within(t, 10*time.Second), "c", "", buf)
					if err != nil {
						t.Fatal(err)
					}
					got = append(got, buf[:n]...)
				}
			}
			if want := "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,"; string(got) != want {
				t.Errorf("got %q, want %q", got, want)
			}
			for range 2 {
				if n, err := c.ReadProcessStdout(within(t, 10*time.Second), "c", "", make([]byte, 9)); n != 0 || !errors.Is(err, io.EOF) {
					t.Errorf("got %d, %v at the end", n, err)
				}
			}
			if n, err := c.ReadProcessStdout(t.Context(), "c", "", nil); n != 0 || err != nil {
				t.Errorf("got %d, %v for an empty buffer", n, err)
			}
		})
	}
}

// Kata's agent ends the output of a terminal with an error.
func TestPlainTerminalEnd(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{Plain: true})
	agenttest.Handle(peer, "ReadStdout", func(context.Context, *protocol.ReadStreamRequest) (*protocol.ReadStreamResponse, error) {
		return nil, errors.New("eof")
	})
	c := newClient(t, peer)
	create(t, c, "c")
	s := streams(t, c, "c", StreamSet{Stdout: true})
	if b, err := io.ReadAll(s.Stdout); len(b) != 0 || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
}

// BenchmarkStdio compares a stream of the client with the socket under it.
func BenchmarkStdio(b *testing.B) {
	chunk := make([]byte, 64<<10)
	b.Run("raw", func(b *testing.B) {
		dial := agenttest.Serve(b, func(_ uint32, conn net.Conn) {
			for {
				if _, err := conn.Write(chunk); err != nil {
					return
				}
			}
		})
		conn, err := dial(b.Context(), 0)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		readMiB(b, conn)
	})
	for name, plain := range map[string]bool{"bytes": false, "plain": true} {
		b.Run(name, func(b *testing.B) {
			peer := agenttest.Start(b, agenttest.Options{Plain: plain, Program: func(_ context.Context, p *agenttest.Process) int {
				for {
					if _, err := p.Stdout.Write(chunk); err != nil {
						return 0
					}
				}
			}})
			c := newClient(b, peer)
			create(b, c, "c")
			s := streams(b, c, "c", StreamSet{Stdout: true})
			start(b, c, "c")
			readMiB(b, s.Stdout)
			_ = c.SignalProcess(b.Context(), "c", "", 9, false)
			_ = s.Close()
		})
	}
}

func readMiB(b *testing.B, r io.Reader) {
	b.Helper()
	buf := make([]byte, 64<<10)
	b.SetBytes(1 << 20)
	for b.Loop() {
		for n := 0; n < 1<<20; {
			m, err := r.Read(buf)
			if err != nil {
				b.Fatal(err)
			}
			n += m
		}
	}
}
