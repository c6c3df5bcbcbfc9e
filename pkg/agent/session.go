package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// A session is a ttrpc client on one connection. What the client does not do
// is done around it: its writes have a deadline, calls end with their context
// even while they are being sent, answers are checked before it sees them.
type session struct {
	life *life
	line *line
	rpc  *ttrpc.Client
}

// newSession takes the connection over. The caller is in the life.
func newSession(l *life, conn net.Conn, writeTimeout time.Duration) *session {
	s := &session{life: l, line: newLine(l, conn)}
	l.jobs.Add(1) // the client's receiver, which ends with the connection
	s.rpc = ttrpc.NewClient(
		&wire{line: s.line, writeTimeout: writeTimeout, answers: newAnswers()},
		ttrpc.WithOnClose(l.leave),
		ttrpc.WithUnaryClientInterceptor(s.intercept),
	)
	return s
}

// intercept is each call, between the encoding of the request and the decoding
// of the answer. It returns a *Error.
func (s *session) intercept(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	err := s.invoke(ctx, req, resp, invoke)
	if err == nil && resp.Status.GetCode() != int32(codes.OK) {
		err = fromStatus(req, resp.Status)
	}
	if err != nil {
		return &Error{Method: req.Method, Err: err}
	}
	return nil
}

func (s *session) invoke(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, invoke ttrpc.Invoker) error {
	if n := proto.Size(req); n > maxMessage {
		return fmt.Errorf("request of %d bytes, at most %d: %w", n, maxMessage, errdefs.ErrInvalidArgument)
	}
	started := time.Now()
	answer := make(chan *ttrpc.Response, 1)
	fault := make(chan error, 1)
	// It waits for the write lock of the client and for the write, both of
	// them ended by the connection's deadline, and then for ctx.
	s.life.jobs.Go(func() {
		var r ttrpc.Response
		if err := invoke(ctx, req, &r); err != nil {
			fault <- err
			return
		}
		answer <- &r
	})
	select {
	case r := <-answer:
		resp.Status, resp.Payload = r.Status, r.Payload
		return nil
	case err := <-fault:
		return s.explain(ctx, started, err)
	case <-ctx.Done():
		return waited(ctx, "no answer", started)
	}
}

// explain finds the reason behind an error of the ttrpc client.
func (s *session) explain(ctx context.Context, started time.Time, err error) error {
	switch {
	case s.line.broken() != nil:
		return s.line.cause
	case ctx.Err() != nil:
		return waited(ctx, "no answer", started)
	default: // its own view of the protocol
		s.line.fail(fmt.Errorf("%w: %w: %w", errdefs.ErrUnavailable, errProtocol, err))
		return s.line.cause
	}
}

// wire is the connection as ttrpc's client sees it.
type wire struct {
	*line
	writeTimeout time.Duration
	answers      *answers
}

func (w *wire) Write(b []byte) (int, error) {
	w.answers.asked(b)
	if err := w.SetWriteDeadline(time.Now().Add(w.writeTimeout)); err != nil {
		return 0, w.lost(err)
	}
	n, err := w.Conn.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("guest took nothing for %v", w.writeTimeout)
	}
	if err != nil {
		// Half a message may be out: nothing can follow it.
		return n, w.lost(err)
	}
	return n, nil
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if perr := w.answers.answered(b[:n]); perr != nil {
		w.fail(fmt.Errorf("%w: %w", errdefs.ErrUnavailable, perr))
		return 0, w.cause
	}
	if err != nil {
		err = w.lost(err)
	}
	return n, err
}
