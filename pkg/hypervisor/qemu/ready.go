package qemu

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	mdvsock "github.com/mdlayher/vsock"
)

// readyPort is the port of this host that a guest behind vhost-device-vsock
// finds. Each machine has ports of its own there; the kernel's are shared by
// all machines, so one that is free is taken.
const readyPort = 1029

// readyTimeout bounds how long one connection may take to say its token.
const readyTimeout = 5 * time.Second

// A doorbell waits for the guest to say that its agent serves: a connection to
// this host that brings the token from the kernel's command line. It is closed
// when that came: it opens once.
type doorbell struct {
	listener net.Listener
	port     uint32
	token    string
	trusted  func(net.Addr) bool
	rung     chan struct{} // closed by serve
	close    func() error
}

// listenKernel waits on a port of the host's AF_VSOCK, for the guest with this
// context id alone.
func listenKernel(cid uint32) (*doorbell, error) {
	l, err := mdvsock.ListenContextID(mdvsock.Host, 0, nil)
	if err != nil {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	addr, ok := l.Addr().(*mdvsock.Addr)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("listen for the guest: address %v", l.Addr())
	}
	return newDoorbell(l, addr.Port, func(peer net.Addr) bool {
		p, ok := peer.(*mdvsock.Addr)
		return ok && p.ContextID == cid
	}), nil
}

// listenHybrid waits on the socket that vhost-device-vsock, running as uid,
// connects to for its guest.
func listenHybrid(streams string, uid int) (*doorbell, error) {
	path := streams + "_" + strconv.Itoa(readyPort)
	l, err := listenUnix(path)
	if err != nil {
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	if err := os.Chown(path, uid, uid); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for the guest: %w", err)
	}
	return newDoorbell(l, readyPort, func(net.Addr) bool { return true }), nil
}

func newDoorbell(l net.Listener, port uint32, trusted func(net.Addr) bool) *doorbell {
	return &doorbell{
		listener: l, port: port, token: rand.Text(), trusted: trusted,
		rung: make(chan struct{}), close: sync.OnceValue(l.Close),
	}
}

// param is the value for the kernel's command line.
func (d *doorbell) param() string { return fmt.Sprintf("%d:%s", d.port, d.token) }

// serve accepts until the token came or the doorbell is closed. One connection
// is heard at a time: before the agent, nothing in a guest can open one.
func (d *doorbell) serve() {
	for {
		conn, err := d.listener.Accept()
		if err != nil {
			return
		}
		ok := d.trusted(conn.RemoteAddr()) && d.hear(conn)
		conn.Close()
		if ok {
			_ = d.close()
			close(d.rung)
			return
		}
	}
}

// hear reads one line and compares it without telling by time how much fits.
func (d *doorbell) hear(conn net.Conn) bool {
	if err := conn.SetReadDeadline(time.Now().Add(readyTimeout)); err != nil {
		return false
	}
	line := make([]byte, len(d.token)+1)
	if _, err := io.ReadFull(conn, line); err != nil {
		return false
	}
	return subtle.ConstantTimeCompare(line, []byte(d.token+"\n")) == 1
}
