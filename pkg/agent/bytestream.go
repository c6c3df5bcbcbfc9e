package agent

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// A byteOutput is stdout or stderr on a connection of its own.
type byteOutput struct {
	line   *line
	chunks extension.ChunkReader
}

func newByteOutput(n *line, r io.Reader) *byteOutput {
	return &byteOutput{line: n, chunks: extension.ChunkReader{R: r}}
}

func (o *byteOutput) Read(b []byte) (int, error) {
	n, err := o.chunks.Read(b)
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF):
		o.line.fail(errClosed) // which tells the guest that all was taken
		return n, io.EOF
	case errors.Is(err, extension.ErrMalformed):
		o.line.fail(fmt.Errorf("%w: %w: %w", errdefs.ErrUnavailable, errProtocol, err))
	default:
		_ = o.line.lost(err)
	}
	return n, cut(o.line.cause)
}

func (o *byteOutput) Close() error { return o.line.Close() }

// cut is the error of an output that ended, for cause, before its end.
func cut(cause error) error {
	if errors.Is(cause, errClosed) {
		return &Error{Err: errClosed}
	}
	return &Error{Err: fmt.Errorf("%w: %w", io.ErrUnexpectedEOF, cause)}
}

// A byteInput is stdin on a connection of its own.
type byteInput struct {
	line   *line
	chunks extension.ChunkWriter

	mu     sync.Mutex
	credit extension.Credit // guarded by mu
	room   chan struct{}    // has an element when there is more of it
}

// newByteInput makes a stdin of the line, and of r, which reads from it. The caller
// is in the life.
func newByteInput(l *life, n *line, r io.Reader) *stdin {
	i := &byteInput{
		line:   n,
		chunks: extension.ChunkWriter{W: n.Conn},
		credit: extension.Credit{Most: extension.Window},
		room:   make(chan struct{}, 1),
	}
	l.jobs.Go(func() { i.readReceipts(r) })
	return newStdin(l, n.down, i.write, i.end)
}

// write sends as long as the guest's process takes it.
func (i *byteInput) write(b []byte) (written int, err error) {
	for len(b) > 0 {
		n := min(len(b), extension.MaxChunk)
		for !i.take(extension.ChunkHead + n) {
			select {
			case <-i.room:
			case <-i.line.down:
				return written, &Error{Err: i.line.cause}
			}
		}
		if _, err := i.chunks.Write(b[:n]); err != nil {
			return written, &Error{Err: i.line.lost(err)}
		}
		written, b = written+n, b[n:]
	}
	return written, nil
}

func (i *byteInput) take(n int) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.credit.Take(n)
}

// readReceipts goes on until the line fails, or fails it: the guest closes when it
// has taken everything, or takes nothing any more.
func (i *byteInput) readReceipts(r io.Reader) {
	for {
		n, err := extension.ReadReceipt(r)
		if err == nil {
			err = i.taken(n)
		}
		switch {
		case errors.Is(err, extension.ErrMalformed):
			i.line.fail(fmt.Errorf("%w: %w: %w", errdefs.ErrUnavailable, errProtocol, err))
			return
		case err != nil:
			_ = i.line.lost(err)
			return
		}
	}
}

// taken makes room, and says so to who waits for it.
func (i *byteInput) taken(n int) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	select {
	case i.room <- struct{}{}:
	default:
	}
	return i.credit.Return(n)
}

// end returns when the guest has taken everything.
func (i *byteInput) end() error {
	if err := extension.WriteEnd(i.line.Conn); err != nil {
		return &Error{Err: i.line.lost(err)}
	}
	<-i.line.down
	return &Error{Err: i.line.cause}
}
