package guest

import (
	"context"
	"errors"
	"os"
	"sync"
)

// An input is the agent's end of a process' stdin. One writer at a time holds its
// lock. Only the end of input closes it, and the end of the process: a writer
// that goes away leaves it open for the next one.
type input struct {
	writer lock
	file   *patient
	tty    bool

	closeOnce sync.Once
	closed    chan struct{}
}

func newInput(f *patient, tty bool) *input {
	return &input{writer: newLock(), file: f, tty: tty, closed: make(chan struct{})}
}

// write writes everything, or returns how much before ctx ended or the process
// closed its end. The caller holds the writer lock.
func (i *input) write(ctx context.Context, p []byte) (int, error) {
	stop := interruptible(ctx, i.file.SetWriteDeadline)
	n, err := i.file.Write(p)
	stop()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = ctx.Err()
	}
	return n, err
}

// end is the end of input. A terminal has none: who reads from it is not told.
func (i *input) end() {
	if i != nil && !i.tty {
		i.close()
	}
}

// close frees the file. A nil input is closed.
func (i *input) close() {
	if i != nil {
		i.closeOnce.Do(func() {
			close(i.closed)
			i.file.Close()
		})
	}
}
