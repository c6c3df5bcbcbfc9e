package agenttest

import (
	"context"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// SocketPair is two ends of a stream with the kernel's buffers between them, until
// the end of the test.
func SocketPair(tb testing.TB) (a, b net.Conn) {
	tb.Helper()
	a, b, err := socketPair()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

// socketPair is two ends of a stream with the kernel's buffers between them.
func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, ferr := net.FileConn(f)
		_ = f.Close() // FileConn has its own
		if ferr != nil {
			err = ferr
			continue
		}
		conns[i] = c
	}
	return conns[0], conns[1], err
}

// A listener accepts what push gives it.
type listener struct {
	backlog chan net.Conn
	closed  chan struct{}
	once    sync.Once

	mu       sync.Mutex
	accepted []net.Conn // guarded by mu
}

func newListener() *listener {
	return &listener{backlog: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *listener) push(ctx context.Context, c net.Conn) error {
	select {
	case l.backlog <- c:
		return nil
	case <-l.closed:
		return net.ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.backlog:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.accepted = append(l.accepted, c)
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	l.drop()
	return nil
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "agenttest", Net: "unix"} }

func (l *listener) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.accepted)
}

func (l *listener) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.accepted {
		_ = c.Close() // again, for those that are closed
	}
}

// Serve is a dialer whose connections, of any port, are handed to a function
// of the test. They are closed when it returns, and at the end of the test.
func Serve(tb testing.TB, serve func(port uint32, conn net.Conn)) func(context.Context, uint32) (net.Conn, error) {
	tb.Helper()
	var mu sync.Mutex
	var jobs sync.WaitGroup
	var conns []net.Conn
	tb.Cleanup(func() {
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		jobs.Wait()
	})
	return func(_ context.Context, port uint32) (net.Conn, error) {
		host, guest, err := socketPair()
		if err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		conns = append(conns, guest)
		jobs.Go(func() {
			defer guest.Close()
			serve(port, guest)
		})
		return host, nil
	}
}
