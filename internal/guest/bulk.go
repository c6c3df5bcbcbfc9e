package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/linger"
)

const (
	// bulkRead is a read or write after which more is expected at once.
	bulkRead = 16 << 10
	// bulkBuffer is what is read at once then: as much as a pipe holds, and four times
	// what a vsock takes in advance, so that the process goes on while it is sent.
	bulkBuffer = 1 << 20
	// maxLingers bounds how often a thread waits for more of it in one call.
	maxLingers = 4
)

// A patient is a non-blocking file that goroutines wait for in two ways: in bulk
// first as threads in the kernel, for a moment, and otherwise by Go's scheduler.
// Every time that all of the agent's goroutines wait and one goes on, the runtime
// passes threads around and wakes its monitor; and it wakes a thread for whatever
// happens to a file that it knows, waited for or not. In an emulated machine, where
// a switch costs 150 µs, that was most of the time of a transfer. So the scheduler
// knows the file only while a goroutine waits by it.
type patient struct {
	file    *os.File        // which Go's scheduler does not know
	raw     syscall.RawConn // the file's
	piece   int             // most bytes of one write
	in, out gate
}

// newPatient takes the descriptor over. A pipe gets in one write what it holds:
// its reader wakes for each.
func newPatient(fd int, name string) (*patient, error) {
	// A file that blocks when it is made is none of the scheduler's.
	_ = unix.SetNonblock(fd, false)
	p := &patient{file: os.NewFile(uintptr(fd), name), piece: bulkBuffer}
	err := unix.SetNonblock(fd, true)
	if err == nil {
		p.raw, err = p.file.SyscallConn()
	}
	if err != nil {
		_ = p.file.Close()
		return nil, fmt.Errorf("watch %s: %w", name, err)
	}
	p.in.events, p.out.events = unix.EPOLLIN|unix.EPOLLRDHUP, unix.EPOLLOUT
	return p, nil
}

// Read implements io.Reader.
func (p *patient) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	return p.readv([][]byte{b}, false)
}

// readv reads what is there, or waits for it. In bulk it lingers.
func (p *patient) readv(room [][]byte, bulk bool) (n int, err error) {
	err = p.do("read", &p.in, unix.POLLIN, bulk, func(fd int) (bool, error) {
		n, err = unix.Readv(fd, room)
		return true, err
	})
	if n = max(n, 0); n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// Write implements io.Writer. What is large is bulk.
func (p *patient) Write(b []byte) (n int, err error) {
	err = p.do("write", &p.out, unix.POLLOUT, len(b) >= bulkRead, func(fd int) (bool, error) {
		m, err := syscall.Write(fd, b[n:min(len(b), n+p.piece)])
		n += max(m, 0)
		return n == len(b), err
	})
	return n, err
}

// do calls f until it is done or fails, and waits where it can't go on.
func (p *patient) do(name string, g *gate, events int16, bulk bool, f func(fd int) (bool, error)) error {
	lingers := 0
	if bulk {
		lingers = maxLingers
	}
	for {
		var done bool
		var err error
		closed := p.raw.Control(func(fd uintptr) { done, err = linger.Do(int(fd), events, lingers, f) })
		switch {
		case closed != nil:
			return os.ErrClosed
		case err != nil:
			return os.NewSyscallError(name, err)
		case done:
			return nil
		}
		if err := g.wait(p.raw); err != nil {
			return err
		}
	}
}

// yield lets a process on the same CPU fill its pipe first.
func yield() { _, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

// SetReadDeadline ends waits for input.
func (p *patient) SetReadDeadline(t time.Time) error { return p.in.setDeadline(t) }

// SetWriteDeadline ends waits for output.
func (p *patient) SetWriteDeadline(t time.Time) error { return p.out.setDeadline(t) }

// SetDeadline ends waits.
func (p *patient) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}

// SyscallConn implements syscall.Conn.
func (p *patient) SyscallConn() (syscall.RawConn, error) { return p.file.SyscallConn() }

// Close ends everything.
func (p *patient) Close() error {
	return errors.Join(p.in.close(), p.out.close(), p.file.Close())
}

// A gate is where a goroutine waits for one event of a file by Go's scheduler,
// which is told of it by way of an epoll instance, and only as long as one waits.
// Most files are never waited for in one of their directions, and have none for it.
type gate struct {
	events uint32

	mu       sync.Mutex
	epoll    *os.File  // guarded by mu; nil: nobody has waited yet
	deadline time.Time // guarded by mu
	closed   bool      // guarded by mu
}

// open returns the epoll instance.
func (g *gate) open(file syscall.RawConn) (*os.File, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, os.ErrClosed
	}
	if g.epoll != nil {
		return g.epoll, nil
	}
	e, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	_ = unix.SetNonblock(e, true)
	epoll := os.NewFile(uintptr(e), "epoll")
	closed := file.Control(func(fd uintptr) {
		err = unix.EpollCtl(e, unix.EPOLL_CTL_ADD, int(fd), &unix.EpollEvent{Events: unix.EPOLLONESHOT})
	})
	if closed != nil {
		err = os.ErrClosed
	}
	if err == nil {
		err = epoll.SetDeadline(g.deadline)
	}
	if err != nil {
		epoll.Close()
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	g.epoll = epoll
	return epoll, nil
}

// wait returns when the file may be ready, or with os.ErrDeadlineExceeded or
// os.ErrClosed.
func (g *gate) wait(file syscall.RawConn) error {
	epoll, err := g.open(file)
	if err != nil {
		return err
	}
	raw, err := epoll.SyscallConn()
	if err != nil {
		return err
	}
	armed := false
	err = raw.Read(func(e uintptr) bool {
		if !armed {
			armed = true
			_ = file.Control(func(fd uintptr) {
				_ = unix.EpollCtl(int(e), unix.EPOLL_CTL_MOD, int(fd), &unix.EpollEvent{Events: g.events | unix.EPOLLONESHOT})
			})
		}
		n, err := unix.EpollWait(int(e), make([]unix.EpollEvent, 1), 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		err = os.ErrClosed
	}
	return err
}

func (g *gate) setDeadline(t time.Time) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return os.ErrClosed
	}
	g.deadline = t
	if g.epoll == nil {
		return nil
	}
	return g.epoll.SetDeadline(t)
}

func (g *gate) close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	if g.epoll == nil {
		return nil
	}
	return g.epoll.Close()
}

// A patientConn is a connection as a patient has it.
type patientConn struct {
	*patient
	local, remote net.Addr
}

// newPatientConn takes the connection over, or closes it.
func newPatientConn(conn net.Conn) (net.Conn, error) {
	defer conn.Close()
	raw := rawConn(conn)
	if raw == nil {
		return nil, errors.New("a connection without a descriptor")
	}
	var fd int
	var err error
	if closed := raw.Control(func(f uintptr) { fd, err = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 0) }); closed != nil {
		return nil, closed
	}
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	p, err := newPatient(fd, "stream")
	if err != nil {
		return nil, err
	}
	p.piece = maxPacket
	return patientConn{p, conn.LocalAddr(), conn.RemoteAddr()}, nil
}

func (c patientConn) LocalAddr() net.Addr  { return c.local }
func (c patientConn) RemoteAddr() net.Addr { return c.remote }

// A bulkReader reads a connection patiently after a large read.
type bulkReader struct {
	net.Conn
	bulk bool
}

func (r *bulkReader) Read(b []byte) (n int, err error) {
	if p, ok := r.Conn.(patientConn); ok {
		n, err = p.readv([][]byte{b}, r.bulk)
	} else {
		n, err = r.Conn.Read(b)
	}
	r.bulk = n >= bulkRead
	return n, err
}
