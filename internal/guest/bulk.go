package guest

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bulkRead is a read after which more is expected at once.
	bulkRead = 16 << 10
	// bulkBuffer is what is read at once then: as much as a pipe holds, and as a
	// vsock takes in advance.
	bulkBuffer = 256 << 10
	// lingerTime bounds how long a thread waits for more of it.
	lingerTime = 10 * time.Millisecond
)

// A patience is how one end of a bulk transfer waits: as a thread in the kernel,
// for a moment, before Go's scheduler waits for it. Every time that all of the
// agent's goroutines wait and one goes on, the runtime passes threads around and
// wakes its monitor: in an emulated machine, where a switch costs 150 µs, that was
// most of the time of a transfer. What comes in small pieces is never waited for.
type patience struct{ conn syscall.RawConn } // nil: there is none

// wait returns when the file is ready for events, or soon.
func (p patience) wait(events int16) {
	if p.conn == nil {
		return
	}
	_ = p.conn.Control(func(fd uintptr) {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, int(lingerTime/time.Millisecond))
	})
}

// yield lets a process on the same CPU fill its pipe first.
func yield() { _, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// A bulkReader reads a connection with patience.
type bulkReader struct {
	net.Conn
	patience patience
	bulk     bool
}

func (r *bulkReader) Read(p []byte) (int, error) {
	if r.bulk {
		r.patience.wait(unix.POLLIN)
	}
	n, err := r.Conn.Read(p)
	r.bulk = n >= bulkRead
	return n, err
}
