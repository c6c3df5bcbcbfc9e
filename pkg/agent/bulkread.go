package agent

import (
	"cmp"
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/linger"
)

const (
	// bulkRead is a read of what is known to come, and not at once: the guest's packets
	// have at most 32 KiB.
	bulkRead = 16 << 10
	// smallRead is what is read together with the length before it. Of more nobody
	// knows whether it comes.
	smallRead = 4 << 10
	// bulkLingers bounds the waits for the packets of a chunk in one read, and so how
	// long the end of the connection can wait for the thread: 80 ms at the most.
	bulkLingers = 8
)

// A bulkReader reads a connection. What is large it reads to its end, if that comes
// soon, on one thread.
type bulkReader struct{ net.Conn }

func (r *bulkReader) Read(b []byte) (n int, err error) {
	file, ok := r.Conn.(syscall.Conn)
	if !ok || len(b) < bulkRead {
		return r.Conn.Read(b)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	var end error
	err = raw.Read(func(fd uintptr) bool {
		_, end = linger.Do(int(fd), unix.POLLIN, bulkLingers, func(fd int) (bool, error) {
			m, err := unix.Read(fd, b[n:])
			n += max(m, 0)
			switch {
			case m == 0:
				return true, io.EOF
			case n == 0 && errors.Is(err, unix.EAGAIN):
				return true, nil // nobody knows when it comes
			}
			return n == len(b), os.NewSyscallError("read", err)
		})
		return n > 0 || end != nil
	})
	return n, cmp.Or(err, end)
}
