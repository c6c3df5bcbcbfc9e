package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// listenInside serves one connection after the other in the containers' network.
func listenInside(t *testing.T, n *testNetwork, address string, serve func(*net.TCPConn)) string {
	t.Helper()
	ns, err := n.sandbox.network.pin()
	if err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	err = thread.Run(func() (err error) {
		if err := ns.enter(); err != nil {
			return err
		}
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serve(conn.(*net.TCPConn))
			conn.Close()
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return l.Addr().String()
}

// connected starts a connection and returns the host's end, and how it went.
func connected(t *testing.T, n *testNetwork, address string) (net.Conn, <-chan error) {
	t.Helper()
	host, guest := agenttest.SocketPair(t)
	s := &server{sandbox: n.sandbox, connects: make(chan struct{}, 1)}
	done := make(chan error, 1)
	go func() { done <- s.connect(t.Context(), guest, address) }()
	return host, done
}

func TestConnect(t *testing.T) {
	n := newTestNetwork(t)
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	// The server answers with the same, when it has it all.
	address := listenInside(t, n, "127.0.0.1:0", func(conn *net.TCPConn) {
		got, _ := io.ReadAll(conn)
		_, _ = conn.Write(got)
	})
	host, done := connected(t, n, address)
	if status, text, err := extension.ReadStreamAnswer(host); err != nil || status != extension.StreamOK {
		t.Fatal(status, text, err)
	}
	client, near := tcpConns(t)
	spliced := make(chan error, 1)
	go func() { spliced <- extension.Splice(near, host) }()
	var sending sync.WaitGroup
	sending.Go(func() {
		if _, err := client.Write(data); err != nil {
			t.Error(err)
		}
		if err := client.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	got, err := io.ReadAll(client)
	sending.Wait()
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
	}
	if err := <-spliced; err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		t.Fatalf("the guest closed first: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	host.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// tcpConns is both ends of a TCP connection.
func tcpConns(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	if b, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	for _, c := range []net.Conn{a, b} {
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

// A host that leaves in the middle is seen by who listens.
func TestConnectCut(t *testing.T) {
	n := newTestNetwork(t)
	seen := make(chan error, 1)
	address := listenInside(t, n, "[::1]:0", func(conn *net.TCPConn) {
		_, err := io.ReadAll(conn)
		seen <- err
	})
	host, done := connected(t, n, address)
	if status, _, err := extension.ReadStreamAnswer(host); err != nil || status != extension.StreamOK {
		t.Fatal(status, err)
	}
	if err := extension.WriteChunk(host, []byte("half of it")); err != nil {
		t.Fatal(err)
	}
	host.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := <-seen; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("listener saw %v", err)
	}
}

func TestConnectRefused(t *testing.T) {
	n := newTestNetwork(t)
	for address, want := range map[string]error{
		"":                 errdefs.ErrInvalidArgument,
		"127.0.0.1:0":      errdefs.ErrInvalidArgument,
		"localhost:80":     errdefs.ErrInvalidArgument,
		"[fe80::1%lo]:80":  errdefs.ErrInvalidArgument,
		"10.1.2.3:80":      errdefs.ErrInvalidArgument, // somebody else's
		"127.0.0.1:1":      errdefs.ErrNotFound,
		"127.0.0.1:999999": errdefs.ErrInvalidArgument,
	} {
		_, done := connected(t, n, address)
		if err := <-done; !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", address, err, want)
		}
	}
	host, guest := agenttest.SocketPair(t)
	defer host.Close()
	s := &server{sandbox: n.sandbox, connects: make(chan struct{})} // full
	if err := s.connect(t.Context(), guest, "127.0.0.1:80"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("one too many: %v", err)
	}
}

func TestDescribeProcess(t *testing.T) {
	p := &extension.ProcessInfo{Pid: uint32(os.Getpid())}
	describeProcess(p, "/proc")
	if p.GetParentPid() != uint32(os.Getppid()) || p.GetUid() != uint32(os.Geteuid()) || p.GetCommand() == "" {
		t.Errorf("this process: %v", p)
	}
	dir := t.TempDir()
	for name, content := range map[string]string{"status": "Name:\tkworker/0:1\nPPid:\t2\nUid:\t0\t5\t0\t0\n", "cmdline": ""} {
		if err := os.MkdirAll(dir+"/7", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(fmt.Sprintf("%s/7/%s", dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p = &extension.ProcessInfo{Pid: 7}
	describeProcess(p, dir)
	if p.GetParentPid() != 2 || p.GetUid() != 5 || p.GetCommand() != "[kworker/0:1]" {
		t.Errorf("kernel thread: %v", p)
	}
	p = &extension.ProcessInfo{Pid: 8}
	describeProcess(p, dir)
	if p.GetCommand() != "" {
		t.Errorf("one that is gone: %v", p)
	}
}
