package agent

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// A life is the time between two disconnects of a peer: its connections, its
// calls in flight and the goroutines that serve them. It ends as a whole.
type life struct {
	peer  *peer
	jobs  sync.WaitGroup // whoever adds holds one already, or the peer's lock
	ended chan struct{}  // closed by end
	cause error          // why; valid once ended is closed

	mu   sync.Mutex
	kept *link // the long-lived connection; guarded by mu
}

func newLife(p *peer) *life { return &life{peer: p, ended: make(chan struct{})} }

// enter is for what a job of this life calls: it stays in the life.
func (l *life) enter() (*life, error) {
	if err := l.over(); err != nil {
		return nil, err
	}
	l.jobs.Add(1)
	return l, nil
}

func (l *life) leave() { l.jobs.Done() }

// end makes everything in the life fail with cause, and waits for it. The
// peer calls it once, after it let go of the life.
func (l *life) end(cause error) {
	l.cause = cause
	close(l.ended)
	l.jobs.Wait()
}

// over says why the life ended, or nil.
func (l *life) over() error {
	select {
	case <-l.ended:
		return l.cause
	default:
		return nil
	}
}

// guard calls fail when the life ends, unless done is closed before. The
// caller is in the life.
func (l *life) guard(done <-chan struct{}, fail func(cause error)) {
	l.jobs.Go(func() {
		select {
		case <-l.ended:
			fail(l.cause)
		case <-done:
		}
	})
}

// dial opens a connection to a port of the guest; 0 is the agent's. It ends
// with ctx and with the life.
func (l *life) dial(ctx context.Context, port uint32) (net.Conn, error) {
	dial, agentPort, err := l.peer.address()
	if err != nil {
		return nil, err
	}
	port = cmp.Or(port, agentPort)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l.guard(ctx.Done(), cancel)
	conn, err := dial(ctx, port)
	switch {
	case err == nil:
		return conn, nil
	case l.over() != nil:
		return nil, l.cause
	case ctx.Err() != nil:
		return nil, fmt.Errorf("dial port %d: %w: %w", port, ctx.Err(), err)
	default:
		return nil, fmt.Errorf("dial port %d: %w: %w", port, errdefs.ErrUnavailable, err)
	}
}

// session gives a connection for one call: the kept one, which is dialed when
// there is none or it broke, or one of its own. The caller is in the life and
// calls release after its call.
func (l *life) session(ctx context.Context, s Settings) (sess *session, release func(), err error) {
	if s.DialPerCall {
		conn, err := l.dial(ctx, 0)
		if err != nil {
			return nil, nil, err
		}
		sess := newSession(l, conn, s.WriteTimeout)
		return sess, func() { sess.line.fail(errClosed) }, nil
	}
	k := l.link(ctx, s)
	select {
	case <-k.ready:
		return k.session, func() {}, k.err
	case <-l.ended:
		return nil, nil, l.cause
	case <-ctx.Done():
		return nil, nil, waited(ctx, "no connection", k.started)
	}
}

// A link is the kept connection, or the attempt to make it. The attempt
// belongs to the life: a caller that gives up does not spoil it for others.
type link struct {
	started time.Time
	ready   chan struct{} // closed when session or err is set
	session *session
	err     error
}

// broken says that a new attempt is due.
func (k *link) broken() bool {
	select {
	case <-k.ready:
		return k.err != nil || k.session.line.broken() != nil
	default:
		return false
	}
}

func (l *life) link(ctx context.Context, s Settings) *link {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.kept == nil || l.kept.broken() {
		k := &link{started: time.Now(), ready: make(chan struct{})}
		l.kept = k
		ctx := context.WithoutCancel(ctx)
		l.jobs.Go(func() { l.connect(ctx, s, k) })
	}
	return l.kept
}

func (l *life) connect(ctx context.Context, s Settings, k *link) {
	defer close(k.ready)
	ctx, cancel := context.WithTimeout(ctx, s.RequestTimeout)
	defer cancel()
	conn, err := l.dial(ctx, 0)
	if err != nil {
		k.err = err
		return
	}
	k.session = newSession(l, conn, s.WriteTimeout)
}
