// Package vsock reaches a guest from its host and a host from its guest: by
// the kernel's AF_VSOCK, or by the unix socket of a vhost-user vsock device
// ("hybrid": write CONNECT and the port, read OK, own the stream).
//
// A stream may lack half-close: vhost-device-vsock does not carry it. Protocols
// on top mark the end of their data themselves.
package vsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// HostCID is the context id of the host as a guest sees it (linux/vm_sockets.h).
const HostCID = vsock.Host

// A Dialer opens a stream to a port of one guest. The context bounds the
// attempt, not the stream.
type Dialer func(ctx context.Context, port uint32) (net.Conn, error)

// Kernel dials the guest with the given context id through AF_VSOCK. Where
// nobody listens the error is ECONNRESET; where no guest is, ENODEV. A guest that
// is silent, because it waits for a CPU of a busy host, say, is dialed again: the
// kernel gives up after two seconds (VSOCK_DEFAULT_CONNECT_TIMEOUT in
// net/vmw_vsock/af_vsock.c), the context decides.
func Kernel(cid uint32) Dialer {
	return func(ctx context.Context, port uint32) (net.Conn, error) {
		for {
			conn, err := vsock.DialContext(ctx, cid, port, nil)
			if err == nil {
				return conn, nil
			}
			if !errors.Is(err, syscall.ETIMEDOUT) || ctx.Err() != nil {
				return nil, fmt.Errorf("dial guest: %w", err) // net.OpError names cid and port
			}
		}
	}
}

// LocalCID is the context id of this guest; ENODEV: it has no vsock, or one that is
// just being set up.
func LocalCID() (uint32, error) {
	cid, err := vsock.ContextID()
	if err == nil && cid == unix.VMADDR_CID_ANY { // what the kernel says then
		err = syscall.ENODEV
	}
	if err != nil {
		return 0, fmt.Errorf("look up context id: %w", err)
	}
	return cid, nil
}

// DialHost connects this guest to a port of its host.
func DialHost(ctx context.Context, port uint32) (net.Conn, error) {
	conn, err := vsock.DialContext(ctx, HostCID, port, nil)
	if err != nil {
		return nil, fmt.Errorf("dial host: %w", err)
	}
	return conn, nil
}
