package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
)

var (
	// errClosed is the cause of a line that its user closed.
	errClosed = errors.New("closed")
	// errLost is in the cause of a line that the guest or the transport ended.
	errLost = errors.New("connection lost")
	// errHangup stands for the transport's io.EOF, which a caller could take
	// for the regular end of a stream.
	errHangup = errors.New("closed by the guest")
)

// A line is a connection that remembers why it ended.
type line struct {
	net.Conn
	down  chan struct{} // closed once, after cause is set
	once  sync.Once
	cause error
}

// newLine watches over conn: it fails when the life ends. The caller is in the life.
func newLine(l *life, conn net.Conn) *line {
	n := &line{Conn: conn, down: make(chan struct{})}
	l.guard(n.down, n.fail)
	return n
}

// fail closes the connection; the first cause counts.
func (n *line) fail(cause error) {
	n.once.Do(func() {
		n.cause = cause
		close(n.down)
		_ = n.Conn.Close() // nothing can be done about it
	})
}

// lost fails the line for an error of the transport and returns the cause,
// which is an older one when there is one: the error may be its consequence.
func (n *line) lost(err error) error {
	if errors.Is(err, io.EOF) {
		err = errHangup
	}
	n.fail(fmt.Errorf("%w: %w: %w", errdefs.ErrUnavailable, errLost, err))
	return n.cause
}

// broken is the cause of the end, or nil.
func (n *line) broken() error {
	select {
	case <-n.down:
		return n.cause
	default:
		return nil
	}
}

// Close ends the line for its user.
func (n *line) Close() error {
	n.fail(errClosed)
	return nil
}

// isLost says that the guest's end of the connection is gone.
func isLost(err error) bool {
	return errors.Is(err, errLost) &&
		(errors.Is(err, errHangup) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE))
}
