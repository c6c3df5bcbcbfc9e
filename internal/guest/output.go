package guest

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// An output is the agent's end of a process' stdout or stderr: a pipe or a
// terminal. One reader at a time holds its lock: a stream connection for as long
// as it lives, a ReadStdout for its call. A reader that could not deliver what it
// read gives it back.
type output struct {
	reader lock
	file   *patient
	rest   []byte // given back; guarded by reader
	ended  bool   // read to its end; guarded by reader

	closeOnce sync.Once
	closed    chan struct{}

	mu      sync.Mutex
	claimed bool // somebody reads it, or did; guarded by mu
}

func newOutput(f *patient) *output {
	return &output{reader: newLock(), file: f, closed: make(chan struct{})}
}

// read returns io.EOF when all writers have closed and everything was read,
// os.ErrClosed after close. When ctx ends first, nothing is lost. In bulk is read
// what is expected at once. The caller holds the reader lock.
func (o *output) read(ctx context.Context, room [][]byte, bulk bool) (int, error) {
	if len(o.rest) > 0 {
		n := 0
		for _, b := range room {
			k := copy(b, o.rest)
			n, o.rest = n+k, o.rest[k:]
		}
		return n, nil
	}
	if o.ended {
		return 0, io.EOF
	}
	stop := interruptible(ctx, o.file.SetReadDeadline)
	n, err := o.file.readv(room, bulk)
	stop()
	switch {
	case n > 0:
		return n, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, ctx.Err()
	case errors.Is(err, io.EOF), errors.Is(err, unix.EIO): // EIO: no one has the terminal open
		o.ended = true
		return 0, io.EOF
	}
	return n, err
}

// unread gives back what was not delivered. The caller holds the reader lock.
func (o *output) unread(p []byte) {
	if len(p) > 0 {
		o.rest = append(append([]byte(nil), p...), o.rest...)
	}
}

// claim notes that there is a reader: what it has not read is kept for it after
// the process is gone.
func (o *output) claim() {
	o.mu.Lock()
	o.claimed = true
	o.mu.Unlock()
}

func (o *output) isClaimed() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.claimed
}

// delivered notes that a reader has been told of the end.
// The caller holds the reader lock.
func (o *output) delivered() { o.close() }

func (o *output) isClosed() bool {
	select {
	case <-o.closed:
		return true
	default:
		return false
	}
}

// close ends every read. A nil output is closed.
func (o *output) close() {
	if o != nil {
		o.closeOnce.Do(func() {
			close(o.closed)
			o.file.Close()
		})
	}
}

// interruptible makes the end of ctx end the I/O that setDeadline governs.
func interruptible(ctx context.Context, setDeadline func(time.Time) error) (done func()) {
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = setDeadline(time.Unix(1, 0))
		close(fired)
	})
	return func() {
		if !stop() {
			<-fired
			_ = setDeadline(time.Time{})
		}
	}
}
