package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A pipeConn is a connection of which only writing works.
type pipeConn struct {
	net.Conn
	w io.Writer
}

func (c pipeConn) Write(p []byte) (int, error) { return c.w.Write(p) }

// testContainer has a process of this host, "c", whose streams are real.
func testContainer(t *testing.T, command ...string) (*service, *container, *process) {
	t.Helper()
	b := newSandbox(Config{Root: t.TempDir()}, nil, nil)
	c := newContainer(b, "c")
	c.state = running
	b.containers["c"] = c
	lib := &libcontainer.Process{}
	streams, err := newStdio(lib, stdioOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = lib.Stdin, lib.Stdout, lib.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := streams.started(stdioOptions{}); err != nil {
		t.Fatal(err)
	}
	p := &process{id: "c", init: true, io: streams, done: make(chan struct{})}
	c.procs["c"], c.init = p, p
	c.reapers.Go(func() {
		_ = cmd.Wait()
		p.finish(exit{status: exitStatus(cmd.ProcessState)})
	})
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		c.reapers.Wait()
		c.closeStreams(t.Context())
	})
	return &service{sandbox: b}, c, p
}

// streamTo opens a stream as a host does, over a socket.
func streamTo(t *testing.T, s *service, which byte, container string) (net.Conn, extension.StreamStatus, string) {
	t.Helper()
	host, agent := agenttest.SocketPair(t)
	srv := &server{sandbox: s.sandbox}
	srv.handshakes.Go(func() { srv.acceptStream(t.Context(), agent) })
	t.Cleanup(srv.handshakes.Wait)
	_ = host.SetDeadline(time.Now().Add(20 * time.Second))
	if err := extension.WriteStreamHeader(host, extension.StreamHeader{Stream: which, ContainerID: container, ExecID: container}); err != nil {
		t.Fatal(err)
	}
	status, message, err := extension.ReadStreamAnswer(host)
	if err != nil {
		t.Fatal(err)
	}
	return host, status, message
}

// drained waits until the container has no stream connections.
func drained(c *container) {
	for n := -1; n != 0; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		n = len(c.streams)
		c.mu.Unlock()
	}
}

func sendAll(t *testing.T, conn net.Conn, data []byte) {
	t.Helper()
	if err := extension.WriteChunk(conn, data); err != nil {
		t.Error(err)
	}
	if err := extension.WriteEnd(conn); err != nil {
		t.Error(err)
	}
	receipts, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("after the end of stdin: %v", err)
	}
	taken := 0
	for r := bytes.NewReader(receipts); r.Len() > 0; {
		n, err := extension.ReadReceipt(r)
		if err != nil {
			t.Error(err)
			break
		}
		taken += n
	}
	sent := len(data) + extension.ChunkHead*((len(data)+extension.MaxChunk-1)/extension.MaxChunk)
	if without := sent - taken; without < 0 || without >= extension.WorthReceipt {
		t.Errorf("receipts for %d bytes of %d", taken, sent)
	}
}

func TestStreamsCopy(t *testing.T) {
	s, c, p := testContainer(t, "cat")
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	in, status, msg := streamTo(t, s, extension.Stdin, "c")
	if status != extension.StreamOK {
		t.Fatal(status, msg)
	}
	out, status, msg := streamTo(t, s, extension.Stdout, "c")
	if status != extension.StreamOK {
		t.Fatal(status, msg)
	}
	var sender sync.WaitGroup
	defer sender.Wait()
	sender.Go(func() { sendAll(t, in, data) })
	got, err := io.ReadAll(&extension.ChunkReader{R: out})
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	out.Close()
	<-p.done
	c.waited(p)
	drained(c)
	// Stderr was never taken, so nothing keeps the process.
	if _, err := c.process("c"); err == nil {
		t.Error("the process is still known")
	}
}

func TestStreamsRefused(t *testing.T) {
	s, _, _ := testContainer(t, "sleep", "100")
	if _, status, _ := streamTo(t, s, extension.Stdout, "none"); status != extension.StreamNotFound {
		t.Errorf("unknown container: %v", status)
	}
	if _, status, msg := streamTo(t, s, extension.Stdout, "c"); status != extension.StreamOK {
		t.Errorf("first: %v %s", status, msg)
	}
	if _, status, _ := streamTo(t, s, extension.Stdout, "c"); status != extension.StreamTaken {
		t.Errorf("second: %v", status)
	}
	host, agent := agenttest.SocketPair(t)
	srv := &server{sandbox: s.sandbox}
	srv.handshakes.Go(func() { srv.acceptStream(t.Context(), agent) })
	if _, err := host.Write([]byte("garbage")); err != nil {
		t.Fatal(err)
	}
	if status, _, err := extension.ReadStreamAnswer(host); err != nil || status != extension.StreamInvalid {
		t.Errorf("garbage: %v, %v", status, err)
	}
	srv.handshakes.Wait()
}

func TestStreamsAfterCut(t *testing.T) {
	s, c, _ := testContainer(t, "cat")
	in, _, _ := streamTo(t, s, extension.Stdin, "c")
	out, _, _ := streamTo(t, s, extension.Stdout, "c")
	if err := extension.WriteChunk(in, []byte("one")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3)
	if _, err := io.ReadFull(&extension.ChunkReader{R: out}, buf); err != nil || string(buf) != "one" {
		t.Fatalf("got %q, %v", buf, err)
	}
	in.Close()
	out.Close()
	drained(c)
	in, status, msg := streamTo(t, s, extension.Stdin, "c")
	if status != extension.StreamOK {
		t.Fatal(msg)
	}
	out, status, msg = streamTo(t, s, extension.Stdout, "c")
	if status != extension.StreamOK {
		t.Fatal(msg)
	}
	var sender sync.WaitGroup
	defer sender.Wait()
	sender.Go(func() { sendAll(t, in, []byte("two")) })
	if got, err := io.ReadAll(&extension.ChunkReader{R: out}); err != nil || string(got) != "two" {
		t.Errorf("got %q, %v", got, err)
	}
	out.Close()
}

// What was read from the process and could not be sent is there for the next one.
func TestStreamsUnsent(t *testing.T) {
	s, c, p := testContainer(t, "sh", "-c", "head -c 1000000 /dev/zero; echo end")
	out, _, _ := streamTo(t, s, extension.Stdout, "c")
	first := make([]byte, 5000)
	if _, err := io.ReadFull(&extension.ChunkReader{R: out}, first); err != nil {
		t.Fatal(err)
	}
	out.Close() // with much on its way: that is lost, and known to be
	drained(c)
	out, status, msg := streamTo(t, s, extension.Stdout, "c")
	if status != extension.StreamOK {
		t.Fatal(msg)
	}
	rest, err := io.ReadAll(&extension.ChunkReader{R: out})
	if err != nil || !strings.HasSuffix(string(rest), "end\n") {
		t.Errorf("got %d bytes, %v", len(rest), err)
	}
	out.Close()
	<-p.done
}

func TestStdinOfAProcessThatDoesNotRead(t *testing.T) {
	s, c, p := testContainer(t, "sh", "-c", "exec <&-; sleep 0.2")
	in, _, _ := streamTo(t, s, extension.Stdin, "c")
	go func() { _ = extension.WriteChunk(in, make([]byte, 1<<20)) }()
	if _, err := io.Copy(io.Discard, in); err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Error(err)
	}
	<-p.done
	drained(c)
}

// A host that leaves before the answer takes no stream with it.
func TestStreamOfAHostThatLeft(t *testing.T) {
	s, c, _ := testContainer(t, "sleep", "100")
	srv := &server{sandbox: s.sandbox}
	for _, which := range []byte{extension.Stdin, extension.Stdout, extension.Stderr} {
		host, agent := agenttest.SocketPair(t)
		if err := extension.WriteStreamHeader(host, extension.StreamHeader{Stream: which, ContainerID: "c", ExecID: "c"}); err != nil {
			t.Fatal(err)
		}
		host.Close()
		srv.acceptStream(t.Context(), agent)
		c.conns.Wait()
		conn, status, msg := streamTo(t, s, which, "c")
		if status != extension.StreamOK {
			t.Errorf("stream %d: %v %s", which, status, msg)
		}
		conn.Close()
		c.conns.Wait()
	}
}

func TestCloseStreamsEndsEverything(t *testing.T) {
	s, c, _ := testContainer(t, "sleep", "100")
	for _, which := range []byte{extension.Stdin, extension.Stdout, extension.Stderr} {
		if _, status, msg := streamTo(t, s, which, "c"); status != extension.StreamOK {
			t.Fatal(msg)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c.closeStreams(ctx)
	if _, status, _ := streamTo(t, s, extension.Stdin, "c"); status != extension.StreamNotFound {
		t.Errorf("a stream after the end: %v", status)
	}
}

func TestPlainStreams(t *testing.T) {
	s, c, p := testContainer(t, "sh", "-c", "cat; echo err >&2")
	ctx := t.Context()
	n, err := s.WriteStdin(ctx, &protocol.WriteStreamRequest{ContainerId: "c", Data: []byte("hello")})
	if err != nil || n.GetLen() != 5 {
		t.Fatalf("write: %v, %v", n, err)
	}
	read := func(f func(context.Context, *protocol.ReadStreamRequest) (*protocol.ReadStreamResponse, error), max uint32) string {
		t.Helper()
		resp, err := f(ctx, &protocol.ReadStreamRequest{ContainerId: "c", ExecId: "c", Len: max})
		if err != nil {
			t.Fatal(err)
		}
		return string(resp.GetData())
	}
	if got := read(s.ReadStdout, 2); got != "he" {
		t.Errorf("got %q", got)
	}
	if got := read(s.ReadStdout, 100); got != "llo" {
		t.Errorf("got %q", got)
	}
	// A read that is given up loses nothing.
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	if _, err := s.ReadStdout(short, &protocol.ReadStreamRequest{ContainerId: "c", Len: 10}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	cancel()
	if _, err := s.WriteStdin(ctx, &protocol.WriteStreamRequest{ContainerId: "c", Data: []byte("more")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CloseStdin(ctx, &protocol.CloseStdinRequest{ContainerId: "c"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.WriteStdin(ctx, &protocol.WriteStreamRequest{ContainerId: "c", Data: []byte("late")}); err == nil {
		t.Error("a write after the end")
	}
	if got := read(s.ReadStdout, 100); got != "more" {
		t.Errorf("got %q", got)
	}
	<-p.done
	c.waited(p) // and still the rest can be read
	if got := read(s.ReadStdout, 100); got != "" {
		t.Errorf("got %q, want the end", got)
	}
	if _, err := s.ReadStderr(ctx, &protocol.ReadStreamRequest{ContainerId: "c", Len: 1}); err == nil {
		t.Error("stderr of a process that is gone, which nobody read before")
	}
	if _, err := s.ReadStdout(ctx, &protocol.ReadStreamRequest{ContainerId: "c"}); err == nil {
		t.Error("a read of nothing")
	}
}

func TestTerminal(t *testing.T) {
	p := &libcontainer.Process{}
	o := stdioOptions{terminal: true}
	s, err := newStdio(p, o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendmsg(int(p.ConsoleSocket.Fd()), []byte("ptmx"), unix.UnixRights(int(master.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	master.Close()
	if err := s.started(o); err != nil {
		t.Fatal(err)
	}
	if err := s.resize(12, 34); err != nil {
		t.Fatal(err)
	}
	size, err := unix.IoctlGetWinsize(int(s.console.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Row != 12 || size.Col != 34 {
		t.Errorf("size %+v, %v", size, err)
	}
	// A read ends with its context although the terminal stays open.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.out.read(ctx, [][]byte{make([]byte, 1)}, false); err == nil {
		t.Error("read something")
	}
	s.in.end()
	if _, err := s.in.write(t.Context(), []byte("x")); err != nil {
		t.Errorf("a terminal has no end of input: %v", err)
	}
	if err := (&stdio{}).resize(1, 1); err == nil {
		t.Error("resized no terminal")
	}
}
