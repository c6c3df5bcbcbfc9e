package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// Connect carries a TCP connection of the host to a listener on an address of
// the guest's own, loopback included. The connection is closed when it returns:
// when both ends are through, or with an error when one was cut.
// ErrNotImplemented by a plain peer.
func (c *Client) Connect(ctx context.Context, tcp *net.TCPConn, to netip.AddrPort) error {
	err := c.connect(ctx, tcp, to)
	if err == nil {
		return tcp.Close()
	}
	_ = tcp.SetLinger(0)
	_ = tcp.Close()
	return &Error{Err: fmt.Errorf("connect to %s: %w", to, err)}
}

func (c *Client) connect(ctx context.Context, tcp *net.TCPConn, to netip.AddrPort) error {
	p := c.peer.Load()
	caps, err := p.caps(ctx)
	if err != nil {
		return err
	}
	if !caps.Connect {
		return errdefs.ErrNotImplemented
	}
	l, err := p.enter()
	if err != nil {
		return err
	}
	defer l.leave()
	dial, cancel := context.WithTimeout(ctx, p.current().RequestTimeout)
	n, r, err := l.openStream(dial, process{containerID: to.String()}, extension.Connect)
	cancel()
	if err != nil {
		return err
	}
	defer n.Close()
	stop := context.AfterFunc(ctx, func() { n.fail(context.Cause(ctx)) })
	defer stop()
	if err := extension.Splice(tcp, &buffered{n, r}); err != nil {
		if cause := n.broken(); cause != nil {
			return cause
		}
		return err
	}
	return nil
}

// A buffered connection reads first what came with the answer.
type buffered struct {
	*line
	r interface{ Read([]byte) (int, error) }
}

func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }
