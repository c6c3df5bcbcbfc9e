package guest

import (
	"context"
	"encoding/binary"
	"net"
	"sync"
)

// An answeringListener knows whether every request on its connections was
// answered, and whether they are closed. The server of ttrpc closes connections
// that it takes for idle, with the last answer not yet written.
type answeringListener struct {
	net.Listener

	mu      sync.Mutex
	conns   map[*answeringConn]struct{} // guarded by mu
	changed chan struct{}
}

func newAnsweringListener(l net.Listener) *answeringListener {
	return &answeringListener{Listener: l, conns: map[*answeringConn]struct{}{}, changed: make(chan struct{}, 1)}
}

// Accept implements net.Listener.
func (l *answeringListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &answeringConn{Conn: conn, listener: l}
	l.mu.Lock()
	l.conns[c] = struct{}{}
	l.mu.Unlock()
	return c, nil
}

// answered waits until nobody waits for an answer.
func (l *answeringListener) answered(ctx context.Context) bool {
	return l.wait(ctx, func() bool {
		for c := range l.conns {
			if c.requests.done > c.answers.done {
				return false
			}
		}
		return true
	})
}

// closed waits until all connections are.
func (l *answeringListener) closed(ctx context.Context) bool {
	return l.wait(ctx, func() bool { return len(l.conns) == 0 })
}

func (l *answeringListener) wait(ctx context.Context, cond func() bool) bool {
	for {
		l.mu.Lock()
		ok := cond()
		l.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-l.changed:
		case <-ctx.Done():
			return false
		}
	}
}

// update changes what wait looks at.
func (l *answeringListener) update(f func()) {
	l.mu.Lock()
	f()
	l.mu.Unlock()
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

type answeringConn struct {
	net.Conn
	listener          *answeringListener
	requests, answers frames // guarded by listener.mu
}

func (c *answeringConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.listener.update(func() { c.requests.feed(p[:n]) })
	return n, err
}

func (c *answeringConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.listener.update(func() { c.answers.feed(p[:n]) })
	return n, err
}

func (c *answeringConn) Close() error {
	c.listener.update(func() { delete(c.listener.conns, c) })
	return c.Conn.Close()
}

// frames counts the messages of ttrpc in a stream of bytes: ten bytes of header,
// of which the first four are the length of the rest.
type frames struct {
	head []byte
	left uint32
	done int
}

const frameHead = 10

func (f *frames) feed(p []byte) {
	for len(p) > 0 {
		if len(f.head) < frameHead {
			n := min(frameHead-len(f.head), len(p))
			f.head, p = append(f.head, p[:n]...), p[n:]
			if len(f.head) < frameHead {
				return
			}
			f.left = binary.BigEndian.Uint32(f.head)
		}
		n := min(int(f.left), len(p))
		f.left, p = f.left-uint32(n), p[n:]
		if f.left == 0 {
			f.done++
			f.head = f.head[:0]
		}
	}
}
