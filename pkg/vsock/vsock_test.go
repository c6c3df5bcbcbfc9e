package vsock

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/net/nettest"
)

// device is the host side of a vhost-user vsock device: it answers one
// handshake with reply and hands out the stream.
func device(t testing.TB, reply string) (path string, accepted <-chan net.Conn) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "g")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	conns := make(chan net.Conn, 1)
	go func() {
		defer close(conns)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "CONNECT 1024\n" {
			t.Errorf("device got %q, %v", line, err)
		}
		if _, err := io.WriteString(conn, reply); err != nil {
			t.Errorf("device reply: %v", err)
		}
		conns <- conn
	}()
	return path, conns
}

func TestHybridStream(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		path, accepted := device(t, "OK 1073741824\n")
		c1, err = Hybrid(path)(t.Context(), 1024)
		if err != nil {
			return nil, nil, nil, err
		}
		c2 = <-accepted
		return c1, c2, func() { c1.Close(); c2.Close() }, nil
	})
}

func TestHybridKeepsBytesBehindReply(t *testing.T) {
	path, accepted := device(t, "OK 5\nfirst words")
	conn, err := Hybrid(path)(t.Context(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	(<-accepted).Close()
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != "first words" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestHybridRefusal(t *testing.T) {
	tests := []struct {
		name  string
		serve func(net.Conn)
		is    error
		text  string
	}{
		{"closed", func(net.Conn) {}, syscall.ECONNREFUSED, "dial guest port 1024: closed by the device"},
		{"closed inside the reply", func(c net.Conn) { _, _ = io.WriteString(c, "OK 1") }, io.EOF, `after "OK 1"`},
		{"not ok", func(c net.Conn) { _, _ = io.WriteString(c, "NO 1\n") }, nil, `"NO 1\n" is not OK`},
		{"no number", func(c net.Conn) { _, _ = io.WriteString(c, "OK x\n") }, nil, `"OK x\n"`},
		{"endless", func(c net.Conn) { _, _ = io.WriteString(c, strings.Repeat("O", 100)) }, nil, "too long"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "g")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			served := make(chan struct{})
			go func() {
				defer close(served)
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				_, _ = bufio.NewReader(c).ReadString('\n')
				tt.serve(c)
			}()
			conn, err := Hybrid(path)(t.Context(), 1024)
			<-served
			if err == nil {
				conn.Close()
				t.Fatal("dial succeeded")
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v is not %v", err, tt.is)
			}
			if !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q lacks %q", err, tt.text)
			}
		})
	}
}

// An attempt ends with its context; its connection when the device has answered, or
// when it is one of too many.
func TestHybridEndsWithContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "g")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dial, gone := Hybrid(path), errors.New("machine gone")
	var held []net.Conn
	for range maxAbandoned + 1 {
		ctx, cancel := context.WithCancelCause(t.Context())
		failed := make(chan error, 1)
		go func() {
			conn, err := dial(ctx, 1024)
			if err == nil {
				conn.Close()
			}
			failed <- err
		}()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		held = append(held, conn)
		if _, err := io.ReadFull(conn, make([]byte, len("CONNECT 1024\n"))); err != nil {
			t.Fatal(err)
		}
		cancel(gone)
		if err := <-failed; !errors.Is(err, gone) {
			t.Errorf("error %v, want the context's cause", err)
		}
	}
	closed := func(conn net.Conn) error {
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err := conn.Read(make([]byte, 1))
		return err
	}
	if err := closed(held[0]); !errors.Is(err, io.EOF) {
		t.Errorf("the oldest of too many: %v, want EOF", err)
	}
	for _, conn := range held[1:] {
		if _, err := io.WriteString(conn, "OK 1\n"); err != nil {
			t.Errorf("a late answer: %v", err)
		}
		if err := closed(conn); !errors.Is(err, io.EOF) {
			t.Errorf("after the answer: %v, want EOF", err)
		}
	}
}

// The context bounds the attempt only.
func TestHybridStreamOutlivesContext(t *testing.T) {
	path, accepted := device(t, "OK 1\n")
	ctx, cancel := context.WithCancel(t.Context())
	conn, err := Hybrid(path)(ctx, 1024)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	peer := <-accepted
	defer peer.Close()
	if _, err := fmt.Fprint(conn, "x"); err != nil {
		t.Errorf("write after cancel: %v", err)
	}
	if _, err := io.ReadFull(peer, make([]byte, 1)); err != nil {
		t.Errorf("read after cancel: %v", err)
	}
}

func TestHybridPathTooLong(t *testing.T) {
	_, err := Hybrid("/"+strings.Repeat("x", 107))(t.Context(), 1)
	if !errors.Is(err, syscall.ENAMETOOLONG) {
		t.Errorf("error %v, want ENAMETOOLONG", err)
	}
}

func TestParse(t *testing.T) {
	tests := []struct {
		url  string
		port uint32
		bad  string
	}{
		{KernelURL(3, 1024), 1024, ""},
		{HybridURL("/run/v:m/g", 1028), 1028, ""},
		{"vsock://3", 0, "no port"},
		{"vsock://3:", 0, "port"},
		{"vsock://3:-1", 0, "port"},
		{"vsock://3:4294967296", 0, "port"},
		{"vsock://-1:1024", 0, "context id"},
		{"vsock://4294967295:1024", 0, "nobody's"},
		{"hvsock://run/g:1", 0, "not absolute"},
		{"hvsock:///run/g", 0, "no port"},
		{"tcp://localhost:1", 0, `scheme "tcp"`},
		{"", 0, "no port"},
	}
	for _, tt := range tests {
		t.Run(tt.url, func(t *testing.T) {
			dial, port, err := Parse(tt.url)
			if tt.bad == "" {
				if err != nil || dial == nil || port != tt.port {
					t.Errorf("got dialer %t, port %d, %v", dial != nil, port, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.bad) || dial != nil {
				t.Errorf("error %v lacks %q", err, tt.bad)
			}
		})
	}
}

// peer is a connection that claims to come from a context id.
type peer struct {
	net.Conn
	cid uint32
}

func (p peer) RemoteAddr() net.Addr { return &vsock.Addr{ContextID: p.cid, Port: 1} }

type backlog chan net.Conn

func (b backlog) Accept() (net.Conn, error) {
	if c, ok := <-b; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (backlog) Close() error   { return nil }
func (backlog) Addr() net.Addr { return nil }

func TestGuestAcceptsOnlyHost(t *testing.T) {
	pending := make(backlog, 4)
	var far []net.Conn
	for _, cid := range []uint32{1, 3, 4294967295, HostCID} {
		near, other := net.Pipe()
		far = append(far, other)
		pending <- peer{near, cid}
	}
	close(pending)
	l := hostOnly{pending}
	conn, err := l.Accept()
	if err != nil || conn.(peer).cid != HostCID {
		t.Fatalf("accepted %v, %v", conn, err)
	}
	defer conn.Close()
	for i, c := range far[:3] {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("stranger %d: %v, want EOF", i, err)
		}
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v, want closed", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("vsock://3:1024")
	f.Add("hvsock:///run/vmshim/0123456789abcdef/v/g:1024")
	f.Add("vsock://[::1]:99999")
	f.Add("hvsock://:1")
	f.Fuzz(func(t *testing.T, url string) {
		dial, _, err := Parse(url)
		if (dial == nil) == (err == nil) {
			t.Errorf("Parse(%q): dialer %t, error %v", url, dial != nil, err)
		}
	})
}

// FuzzReply feeds what a device says to the handshake: it never takes more
// than the line.
func FuzzReply(f *testing.F) {
	for _, seed := range []string{"OK 1\n", "OK 4294967295\nrest", "OK \n", "\n", "", "OK 00000000000000001\n", "ok 1\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, reply []byte) {
		r := bytes.NewReader(reply)
		err := handshake(struct {
			io.Reader
			io.Writer
		}{r, io.Discard}, 7)
		rest := reply[len(reply)-r.Len():]
		line, behind, found := bytes.Cut(reply, []byte("\n"))
		switch {
		case err == nil && (!found || !bytes.HasPrefix(line, []byte("OK ")) || !bytes.Equal(rest, behind)):
			t.Errorf("accepted %q, left %q", reply, rest)
		case len(reply)-len(rest) > maxReply:
			t.Errorf("took %d bytes", len(reply)-len(rest))
		}
	})
}
