package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// service is what the generated clients offer, as method expressions have it.
type service = protocol.AgentServiceService

// An entry leads to the life that a call is made in: a peer's current one, or
// that of the job which makes the call.
type entry interface {
	enter() (*life, error)
}

// ask calls a method of the agent's service. A context without a deadline
// gets the request timeout.
func ask[Q, A any](ctx context.Context, in entry, method func(service, context.Context, Q) (A, error), req Q) (A, error) {
	return invoke(ctx, in, true, protocol.NewAgentServiceClient, method, req)
}

// tell is ask for methods that answer nothing.
func tell[Q any](ctx context.Context, in entry, method func(service, context.Context, Q) (*emptypb.Empty, error), req Q) error {
	_, err := ask(ctx, in, method, req)
	return err
}

// await is ask for methods that answer when something happens, which may be never.
func await[Q, A any](ctx context.Context, in entry, method func(service, context.Context, Q) (A, error), req Q) (A, error) {
	return invoke(ctx, in, false, protocol.NewAgentServiceClient, method, req)
}

func askHealth[A any](ctx context.Context, in entry, method func(protocol.HealthService, context.Context, *protocol.CheckRequest) (A, error)) (A, error) {
	return invoke(ctx, in, true, protocol.NewHealthClient, method, &protocol.CheckRequest{})
}

func askExtension[Q, A any](ctx context.Context, in entry, method func(extension.ExtensionService, context.Context, Q) (A, error), req Q) (A, error) {
	return invoke(ctx, in, true, extension.NewExtensionClient, method, req)
}

// invoke makes one call. All errors of all operations pass here.
func invoke[S, Q, A any](ctx context.Context, in entry, bounded bool, client func(*ttrpc.Client) S, method func(S, context.Context, Q) (A, error), req Q) (A, error) {
	a, err := attempt(ctx, in, bounded, func(ctx context.Context, sess *session) (A, error) {
		a, err := method(client(sess.rpc), ctx, req)
		if e := (*Error)(nil); err != nil && !errors.As(err, &e) {
			err = fmt.Errorf("%w: %w: %w", errdefs.ErrUnavailable, errProtocol, err) // the answer is no message
		}
		return a, err
	})
	if e := (*Error)(nil); err != nil && !errors.As(err, &e) {
		err = &Error{Err: err}
	}
	return a, err
}

// attempt calls f with a connection.
func attempt[A any](ctx context.Context, in entry, bounded bool, f func(context.Context, *session) (A, error)) (a A, err error) {
	if err := ctx.Err(); err != nil {
		return a, err
	}
	l, err := in.enter()
	if err != nil {
		return a, err
	}
	defer l.leave()
	settings := l.peer.current()
	if bounded {
		var cancel func()
		ctx, cancel = settings.bound(ctx)
		defer cancel()
	}
	sess, release, err := l.session(ctx, settings)
	if err != nil {
		return a, err
	}
	defer release()
	return f(ctx, sess)
}

// bound gives a context that has a deadline.
func (s Settings) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, s.RequestTimeout)
}

// A pending is a call that lasts longer than its caller: nobody can take a
// call back from the guest, and the answer must not get lost.
type pending[T any] struct {
	done  chan struct{} // closed when value and err are set
	value T
	err   error
}

// begin calls f in the peer's current life, with ctx's values but not its end.
func begin[T any](ctx context.Context, p *peer, f func(context.Context, *life) (T, error)) *pending[T] {
	c := &pending[T]{done: make(chan struct{})}
	l, err := p.enter()
	if err != nil {
		c.err = &Error{Err: err}
		close(c.done)
		return c
	}
	ctx = context.WithoutCancel(ctx)
	go func() { // a job of the life, which it leaves
		defer l.leave()
		defer close(c.done)
		c.value, c.err = f(ctx, l)
	}()
	return c
}

// over says that the call has returned.
func (c *pending[T]) over() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// wait returns the result, or ctx's error while there is none.
func (c *pending[T]) wait(ctx context.Context) (T, error) {
	if !c.over() {
		started := time.Now()
		select {
		case <-c.done:
		case <-ctx.Done():
			var none T
			return none, &Error{Err: waited(ctx, "no answer", started)}
		}
	}
	return c.value, c.err
}

// A series is calls of one kind, one after the other. When a caller leaves
// early, the next one gets the result of the call it left. It is for whoever
// has the turn.
type series[T any] struct{ current *pending[T] }

// next gives the result of the call in flight, or of a new one.
func (s *series[T]) next(ctx context.Context, p *peer, f func(context.Context, *life) (T, error)) (T, error) {
	if s.current == nil {
		s.current = begin(ctx, p, f)
	}
	return s.finish(ctx)
}

// finish waits for the call in flight, if there is one.
func (s *series[T]) finish(ctx context.Context) (value T, err error) {
	if s.current == nil {
		return value, nil
	}
	c := s.current
	value, err = c.wait(ctx)
	if c.over() {
		s.current = nil
		return c.value, c.err
	}
	return value, err
}

// A turn is a lock that a context can give up on; it may be held while waiting.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) give() { <-t }
