package agent

import (
	"errors"
	"fmt"
	"io"

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

// newByteInput is stdin on a connection of its own. The caller is in the life.
func newByteInput(l *life, n *line, r io.Reader) *stdin {
	chunks := extension.ChunkWriter{W: n.Conn}
	return newStdin(l, n.down, func(b []byte) (int, error) {
		written, err := chunks.Write(b)
		if err != nil {
			err = &Error{Err: n.lost(err)}
		}
		return written, err
	}, func() error {
		defer n.fail(errClosed)
		if err := extension.WriteEnd(n.Conn); err != nil {
			return &Error{Err: n.lost(err)}
		}
		// The guest says nothing; it closes when it has taken everything.
		if _, err := io.ReadFull(r, make([]byte, 1)); !errors.Is(err, io.EOF) && err != nil {
			return &Error{Err: n.lost(err)}
		}
		return nil
	})
}
