package guest

import (
	"fmt"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A lowWater is how many bytes must have come before a reader of the connection
// wakes up. A chunk comes in packets of less than 4 KiB (the kernel's
// VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE), and each would wake the agent, which would
// wake the process.
type lowWater struct {
	conn syscall.RawConn // nil: the connection has no mark
	mark int
	most int
}

// inputBuffer is how much of an input the kernel takes in advance: all that the host
// sends without a receipt.
const inputBuffer = extension.Window

func newLowWater(conn net.Conn) *lowWater {
	w := &lowWater{conn: rawConn(conn), mark: 1, most: maxLowWater()}
	if w.conn != nil {
		_ = w.conn.Control(func(fd uintptr) { // without it, it is slower
			for _, option := range []int{unix.SO_VM_SOCKETS_BUFFER_MAX_SIZE, unix.SO_VM_SOCKETS_BUFFER_SIZE} {
				_ = unix.SetsockoptUint64(int(fd), unix.AF_VSOCK, option, inputBuffer)
			}
		})
	}
	return w
}

// set is a hint: few bytes are not worth a system call, and kernels before 6.1
// have no mark for a vsock.
func (w *lowWater) set(n int) {
	if n = min(n, w.most); n < 4<<10 {
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

var maxLowWater = sync.OnceValue(func() int {
	var name unix.Utsname
	_ = unix.Uname(&name) // can't fail
	return lowWaterOf(unix.ByteSliceToString(name.Release[:]))
})

// lowWaterOf is what the other side may always send to a guest with this kernel. Since
// 6.8 it hears of new space whenever a reader waits for more than there is; before,
// only 64 KiB before it has none (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE, of which a little is
// left for packets that are not full).
func lowWaterOf(release string) int {
	var major, minor int
	_, _ = fmt.Sscanf(release, "%d.%d", &major, &minor) // 0.0: an old one
	if major > 6 || major == 6 && minor >= 8 {
		return extension.MaxChunk
	}
	return 60 << 10
}
