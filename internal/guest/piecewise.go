package guest

import (
	"net"
	"syscall"
)

// maxPacket is how much the guest's kernel sends in one piece of memory. Of a
// longer write it makes packets of several, which vhost-device-vsock (0.3) drops
// without a word: it reads only the first.
const maxPacket = 32 << 10

// A piecewiseListener has connections that write no more than maxPacket at once.
type piecewiseListener struct{ net.Listener }

func (l piecewiseListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return piecewiseConn{conn}, nil
}

type piecewiseConn struct{ net.Conn }

func (c piecewiseConn) Write(p []byte) (n int, err error) {
	for {
		k, err := c.Conn.Write(p[:min(len(p), maxPacket)])
		n, p = n+k, p[k:]
		if err != nil || len(p) == 0 {
			return n, err
		}
	}
}

// rawConn is the descriptor of a connection or file, or nil.
func rawConn(c any) syscall.RawConn {
	if p, ok := c.(piecewiseConn); ok {
		c = p.Conn
	}
	if c, ok := c.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}
