package qemu

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"

	mdvsock "github.com/mdlayher/vsock"
)

// hybridCID is the context id of a guest behind vhost-device-vsock, which has
// ports of its own and so can be any.
const hybridCID = 3

// vsockBuffer is how many bytes vhost-device-vsock takes from a guest's
// connection in advance: as many as the kernel's vhost does
// (VSOCK_DEFAULT_BUFFER_SIZE in net/vmw_vsock/af_vsock.c), four times its own default.
// With more a stream hangs: the daemon says that there is space again after three
// quarters of its buffer, and a guest has no more under way than its own holds (since
// "vsock/virtio: cap TX credit to local buffer size", Linux 6.12.68 among others).
const vsockBuffer = 256 << 10

// A doorbell waits for the guest to say that its agent serves: by a connection
// to the port of this host that has the number of the guest's context id, so
// that it needs not be told which. It opens once.
type doorbell struct {
	listener net.Listener
	trusted  func(net.Addr) bool
	rung     chan struct{} // closed by serve
	close    func() error
}

// listenKernel waits on a port of the host's AF_VSOCK, for the guest with this
// context id alone.
func listenKernel(cid uint32) (*doorbell, error) {
	l, err := mdvsock.ListenContextID(mdvsock.Host, cid, nil)
	if err != nil {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	return newDoorbell(l, func(peer net.Addr) bool {
		p, ok := peer.(*mdvsock.Addr)
		return ok && p.ContextID == cid
	}), nil
}

// listenHybrid waits on the socket that vhost-device-vsock, running as uid,
// connects to for its guest.
func listenHybrid(streams string, uid int) (*doorbell, error) {
	path := streams + "_" + strconv.Itoa(hybridCID)
	l, err := listenUnix(path)
	if err != nil {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	if err := os.Chown(path, uid, uid); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	return newDoorbell(l, func(net.Addr) bool { return true }), nil
}

func newDoorbell(l net.Listener, trusted func(net.Addr) bool) *doorbell {
	return &doorbell{listener: l, trusted: trusted, rung: make(chan struct{}), close: sync.OnceValue(l.Close)}
}

// serve accepts until the guest has called or the doorbell is closed.
func (d *doorbell) serve() {
	for {
		conn, err := d.listener.Accept()
		if err != nil {
			return
		}
		ok := d.trusted(conn.RemoteAddr())
		conn.Close()
		if ok {
			_ = d.close()
			close(d.rung)
			return
		}
	}
}
