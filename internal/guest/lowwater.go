package guest

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// A lowWater is how many bytes must have come before a reader of the connection
// wakes up. The host's 64 KiB come in packets of less than 4 KiB (the kernel's
// VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE), and each would wake the agent, which would
// wake the process.
type lowWater struct {
	conn syscall.RawConn // nil: the connection has no mark
	mark int
}

// maxLowWater is a little less than what the other side may always send: with the
// kernel's buffer of 256 KiB it hears of new space 64 KiB before it runs out of it
// (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const maxLowWater = 60 << 10

func newLowWater(conn net.Conn) *lowWater { return &lowWater{conn: rawConn(conn), mark: 1} }

// set is a hint: few bytes are not worth a system call, and kernels before 6.1
// have no mark for a vsock.
func (w *lowWater) set(n int) {
	if n = min(n, maxLowWater); n < 4<<10 {
		n = 1
	}
	if w.conn == nil || n == w.mark {
		return
	}
	w.mark = n
	_ = w.conn.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVLOWAT, n)
	})
}
