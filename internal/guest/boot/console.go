package boot

import (
	"io"
	"sync"
	"time"
)

// consoleBytes is how much output may wait for a console that is slow.
const consoleBytes = 64 << 10

// A console writes behind the back of its callers: when the host does not
// drain the serial port they go on, and the oldest output is lost.
type console struct {
	mu     sync.Mutex
	buf    []byte        // guarded by mu: what is to be written
	wake   chan struct{} // holds one token while buf may have bytes
	closed bool          // guarded by mu
	done   chan struct{} // closed when the writer ended
}

func newConsole(w io.Writer) *console {
	c := &console{wake: make(chan struct{}, 1), done: make(chan struct{})}
	go c.run(w)
	return c
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.buf = append(c.buf, p...)
	if over := len(c.buf) - consoleBytes; over > 0 {
		c.buf = append(c.buf[:0], c.buf[over:]...)
	}
	c.mu.Unlock()
	c.poke()
	return len(p), nil
}

// Flush ends the writer and waits for it, no longer than d.
func (c *console) Flush(d time.Duration) {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.poke()
	select {
	case <-c.done:
	case <-time.After(d):
	}
}

func (c *console) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *console) run(w io.Writer) {
	defer close(c.done)
	for range c.wake {
		p, closed := c.take()
		if len(p) > 0 {
			_, _ = w.Write(p) // there is nowhere to report it
		}
		if closed {
			return
		}
	}
}

func (c *console) take() (p []byte, closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p, c.buf = c.buf, nil
	return p, c.closed
}
