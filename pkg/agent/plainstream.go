package agent

import (
	"context"
	"errors"
	"io"

	"github.com/containerd/errdefs"
)

// plainStreams carries the streams by one call per piece. The caller is in the
// life. drains are closed when an output has ended.
func (l *life) plainStreams(ctx context.Context, id process, want StreamSet) (s *Streams, drains []<-chan struct{}) {
	p := l.peer
	s = &Streams{}
	open := func() (context.Context, context.CancelCauseFunc) {
		ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		l.guard(ctx.Done(), cancel)
		s.cut = append(s.cut, func() { cancel(errClosed) })
		return ctx, cancel
	}
	output := func(read func(context.Context, process, []byte) (int, error)) io.ReadCloser {
		ctx, cancel := open()
		drains = append(drains, ctx.Done())
		return &plainOutput{
			read:  func(b []byte) (int, error) { return read(ctx, id, b) },
			cause: func() error { return context.Cause(ctx) },
			end:   cancel,
		}
	}
	if want.Stdin {
		ctx, cancel := open()
		s.Stdin = newStdin(l, ctx.Done(), func(b []byte) (int, error) {
			return p.writeStdin(ctx, id, b)
		}, func() error {
			defer cancel(errClosed)
			err := p.closeStdin(ctx, id)
			if errdefs.IsNotFound(err) {
				return nil
			}
			return err
		})
	}
	if want.Stdout {
		s.Stdout = output(p.readStdout)
	}
	if want.Stderr {
		s.Stderr = output(p.readStderr)
	}
	return s, drains
}

// A plainOutput is stdout or stderr by calls.
type plainOutput struct {
	read  func([]byte) (int, error)
	end   context.CancelCauseFunc // the first cause counts
	cause func() error            // why it ended, or nil
}

func (o *plainOutput) Read(b []byte) (int, error) {
	if o.cause() == nil {
		n, err := o.read(b)
		if err == nil {
			return n, nil
		}
		o.end(err)
	}
	if cause := o.cause(); !errors.Is(cause, io.EOF) {
		return 0, cut(cause)
	}
	return 0, io.EOF
}

func (o *plainOutput) Close() error {
	o.end(errClosed)
	return nil
}
