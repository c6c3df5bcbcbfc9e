package qemu

import (
	"io"
	"net"
	"os"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// consoleSize is what is kept of the guest's console.
const consoleSize = 64 << 10

// Lines of the console that go to the log: so many in a period, the rest is
// counted. A guest must not fill the host's disk.
const (
	consoleLines  = 200
	consolePeriod = time.Second
)

// A console reads the guest's serial port as fast as it comes, so that the
// guest never waits, keeps the end of it, and repeats it in the debug log.
type console struct {
	conn net.Conn
	ring *ring
	done chan struct{}
}

// newConsole makes the serial port's two ends; the second is for QEMU.
func newConsole(logger *log.Entry) (*console, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "console"), os.NewFile(uintptr(fds[1]), "console")
	conn, err := net.FileConn(near)
	near.Close()
	if err != nil {
		far.Close()
		return nil, nil, err
	}
	c := &console{conn: conn, ring: newRing(consoleSize), done: make(chan struct{})}
	go c.read(logger) // joined by close
	return c, far, nil
}

func (c *console) read(logger *log.Entry) {
	defer close(c.done)
	lines := lineSplitter{emit: limit(logger)}
	_, _ = io.Copy(io.MultiWriter(c.ring, &lines), c.conn)
	lines.flush()
}

// close waits for the end of what QEMU wrote, which is dead, and frees.
func (c *console) close() {
	_ = c.conn.SetReadDeadline(time.Now().Add(drainTimeout))
	<-c.done
	c.conn.Close()
}

// limit logs lines, but not more than a guest may.
func limit(logger *log.Entry) func(string) {
	logger = logger.WithField("component", "console")
	if !logger.Logger.IsLevelEnabled(log.DebugLevel) {
		return func(string) {}
	}
	var (
		since   time.Time
		logged  int
		dropped int
	)
	return func(line string) {
		if now := time.Now(); now.Sub(since) >= consolePeriod {
			if dropped > 0 {
				logger.WithField("lines", dropped).Debug("console lines dropped")
			}
			since, logged, dropped = now, 0, 0
		}
		if logged++; logged > consoleLines {
			dropped++
			return
		}
		logger.WithField("line", line).Debug("guest console")
	}
}
