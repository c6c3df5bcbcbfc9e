package agent

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// closeWait bounds how long Close waits until the guest has taken everything.
// The end is on its way all the same, however long the process does not read.
const closeWait = time.Second

// A stdin writes in order, and ends in order. A write may block for as long as
// the process does not read; cutting the stream ends it.
type stdin struct {
	write func([]byte) (int, error)
	end   func() error    // returns when the guest has taken the end
	down  <-chan struct{} // closed when the stream is cut

	turn    turn // to write, or to end
	once    sync.Once
	closing chan struct{} // closed by Close
	over    chan struct{} // closed after the end
	err     error         // of the end; valid once over is closed
}

// newStdin makes a stdin of two functions that down ends. The caller is in the life.
func newStdin(l *life, down <-chan struct{}, write func([]byte) (int, error), end func() error) *stdin {
	s := &stdin{
		write:   write,
		end:     end,
		down:    down,
		turn:    newTurn(),
		closing: make(chan struct{}),
		over:    make(chan struct{}),
	}
	l.jobs.Go(s.run)
	return s
}

// run waits for Close and sends the end, behind the write that is going on.
func (s *stdin) run() {
	defer close(s.over)
	select {
	case <-s.closing:
	case <-s.down:
		return
	}
	select {
	case s.turn <- struct{}{}: // never given back
		s.err = s.end()
		if isLost(s.err) {
			s.err = nil // a process that is gone needs no end
		}
	case <-s.down:
	}
}

func (s *stdin) Write(b []byte) (int, error) {
	select {
	case <-s.closing:
		return 0, io.ErrClosedPipe
	default:
	}
	select {
	case s.turn <- struct{}{}:
		defer s.turn.give()
	case <-s.closing:
		return 0, io.ErrClosedPipe
	case <-s.down:
		return 0, io.ErrClosedPipe
	}
	n, err := s.write(b)
	if isLost(err) {
		err = fmt.Errorf("%w: %w", io.ErrClosedPipe, err)
	}
	return n, err
}

func (s *stdin) Close() error {
	s.once.Do(func() { close(s.closing) })
	timeout := time.NewTimer(closeWait)
	defer timeout.Stop()
	select {
	case <-s.over:
		return s.err
	case <-timeout.C:
		return nil
	}
}
