// Package vsock reaches a guest from its host and a host from its guest: by
// the kernel's AF_VSOCK, or by the unix socket of a vhost-user vsock device
// ("hybrid": write CONNECT and the port, read OK, own the stream).
package vsock

import (
	"context"
	"net"

	"github.com/containerd/errdefs"
)

// HostCID is the context id of the host as a guest sees it (linux/vm_sockets.h).
const HostCID = 2

// A Dialer opens a stream to a port of one guest. The context bounds the
// attempt, not the stream.
type Dialer func(ctx context.Context, port uint32) (net.Conn, error)

// Kernel dials the guest with the given context id through AF_VSOCK.
func Kernel(cid uint32) Dialer {
	return func(ctx context.Context, port uint32) (net.Conn, error) { return nil, errdefs.ErrNotImplemented }
}

// Hybrid dials through the unix socket at path.
func Hybrid(path string) Dialer {
	return func(ctx context.Context, port uint32) (net.Conn, error) { return nil, errdefs.ErrNotImplemented }
}

// Parse reads an agent URL, vsock://CID:PORT or hvsock://PATH:PORT.
func Parse(url string) (Dialer, uint32, error) {
	return nil, 0, errdefs.ErrNotImplemented
}

// ListenGuest listens on a port of this guest and accepts only connections
// whose peer is the host: the agent protocol has no authentication, and
// workloads can open vsock.
func ListenGuest(port uint32) (net.Listener, error) {
	return nil, errdefs.ErrNotImplemented
}

// DialHost connects this guest to a port of its host.
func DialHost(ctx context.Context, port uint32) (net.Conn, error) {
	return nil, errdefs.ErrNotImplemented
}
