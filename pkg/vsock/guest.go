package vsock

import (
	"fmt"
	"net"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// ListenGuest listens on a port of this guest and accepts only connections
// whose peer is the host: the agent protocol has no authentication, and
// workloads can open vsock.
func ListenGuest(port uint32) (net.Listener, error) {
	// Bound to every context id: this guest has another when it goes on from a
	// template.
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return hostOnly{l}, nil
}

type hostOnly struct{ net.Listener }

// Accept drops connections from anybody but the host without a word.
func (l hostOnly) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err // net.Listener's own: callers look for net.ErrClosed
		}
		if addr, ok := conn.RemoteAddr().(*vsock.Addr); ok && addr.ContextID == HostCID {
			return conn, nil
		}
		_ = conn.Close()
	}
}
