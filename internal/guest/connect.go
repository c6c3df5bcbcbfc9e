package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"github.com/vmshim/vmshim/internal/rtnetlink"
	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const (
	// maxConnects bounds the connections that hosts make into the containers'
	// network at the same time.
	maxConnects = 256
	// connectTimeout bounds the dial, which has to go no farther than the loopback
	// device.
	connectTimeout = 5 * time.Second
	// hangUpTimeout is what a host has to close a connection that is through.
	hangUpTimeout = 10 * time.Second
)

// connect makes the stream a TCP connection to a listener in the containers'
// network. It goes on until both ends of it are through, or ctx ends.
func (s *server) connect(ctx context.Context, conn net.Conn, address string) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil || to.Port() == 0 || to.Addr().Zone() != "" {
		return invalid("address %q", bound(address, 128))
	}
	select {
	case s.connects <- struct{}{}:
	default:
		return fmt.Errorf("%d connections already: %w", maxConnects, errdefs.ErrAlreadyExists)
	}
	defer func() { <-s.connects }()
	tcp, err := s.sandbox.network.dial(ctx, to)
	if err != nil {
		return err
	}
	defer tcp.Close()
	stop := context.AfterFunc(ctx, func() { tcp.Close() })
	defer stop()
	defer conn.Close()
	if extension.WriteStreamAnswer(conn, extension.StreamOK, "") != nil || conn.SetDeadline(time.Time{}) != nil {
		return nil // the host has gone
	}
	if extension.Splice(tcp, conn) == nil {
		_ = conn.SetDeadline(time.Now().Add(hangUpTimeout))
		_, _ = io.Copy(io.Discard, conn)
	}
	return nil
}

// dial connects inside, to an address of the guest itself.
func (n *network) dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	ns, err := n.pin()
	if err != nil {
		return nil, err
	}
	if err := n.look(func(h *netlink.Handle) error { return own(h, to.Addr()) }); err != nil {
		return nil, err
	}
	var conn net.Conn
	err = thread.Run(func() error { // whose namespace a socket gets
		if err := ns.enter(); err != nil {
			return err
		}
		d := net.Dialer{Timeout: connectTimeout}
		var err error
		conn, err = d.DialContext(ctx, "tcp", to.String())
		return err
	})
	if err != nil {
		return nil, notFound("connect to %s: %v", to, err)
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(invalid("%s is no TCP connection", to), conn.Close())
	}
	return tcp, nil
}

// own fails for an address that is not one of the containers' network itself:
// nobody's way out leads through here.
func own(h *netlink.Handle, ip netip.Addr) error {
	if ip = ip.Unmap(); ip.IsLoopback() {
		return nil
	}
	addrs, err := rtnetlink.Dump(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if prefixOf(a.IPNet).Addr() == ip {
			return nil
		}
	}
	return invalid("address %s is not the containers' own", ip)
}
