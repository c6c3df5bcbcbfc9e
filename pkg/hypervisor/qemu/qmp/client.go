// Package qmp speaks QEMU's machine protocol on one connection.
//
//   - Connect reads the greeting and negotiates; the connection is the client's
//     from then on.
//   - Execute sends a command and waits for its reply; many may be under way.
//   - Events are handed to a function, in order, on the client's one goroutine.
//   - The client ends with its connection: Done is closed, Err says why. Close
//     ends it and joins the goroutine.
//
// It neither connects again nor retries: one connection lives as long as the
// QEMU at its other end. What QEMU sends is bounded and never trusted: a guest
// may have taken QEMU over.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxLine bounds a message. The longest that QEMU sends, the reply to
// query-qmp-schema, has a quarter of it.
const maxLine = 1 << 20

// A Client is one end of a QMP connection.
type Client struct {
	conn    *net.UnixConn
	version Version
	onEvent func(Event)
	writing chan struct{} // holds a token while somebody writes
	done    chan struct{}
	err     error // why the connection ended; valid after done

	mu      sync.Mutex
	next    uint64                  // guarded by mu
	pending map[uint64]chan message // guarded by mu; nil after the end
}

// Connect takes over a connection to QEMU and returns when commands can be
// executed; on error the connection is closed. onEvent, which may be nil, is
// called for every event and must not block, nor call the client.
func Connect(ctx context.Context, conn *net.UnixConn, onEvent func(Event)) (*Client, error) {
	if onEvent == nil {
		onEvent = func(Event) {}
	}
	c := &Client{
		conn:    conn,
		onEvent: onEvent,
		writing: make(chan struct{}, 1),
		done:    make(chan struct{}),
		pending: map[uint64]chan message{},
	}
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)
	if err := c.greet(ctx, lines); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("qmp greeting: %w", err)
	}
	go c.read(lines) // joined by Close
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// Version is QEMU's, from the greeting.
func (c *Client) Version() Version { return c.version }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended. Valid after Done.
func (c *Client) Err() error { return c.err }

// Close ends the connection and returns when no event function runs any more.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Execute sends a command and decodes what it returns into reply. A command
// that QEMU refuses is an *Error. When the context ends first the command may
// still take effect.
func (c *Client) Execute(ctx context.Context, command string, args, reply any) error {
	return c.execute(ctx, command, args, reply, nil)
}

// GetFD hands a file to QEMU under a name for later commands (getfd). The
// caller keeps its own descriptor.
func (c *Client) GetFD(ctx context.Context, name string, file *os.File) error {
	return c.execute(ctx, "getfd", map[string]string{"fdname": name}, nil, file)
}

// AddFD puts a file into a descriptor set of QEMU, which opens it there as
// /dev/fdset/SET (add-fd). The caller keeps its own descriptor.
func (c *Client) AddFD(ctx context.Context, set int, file *os.File) error {
	return c.execute(ctx, "add-fd", map[string]int{"fdset-id": set}, nil, file)
}

func (c *Client) execute(ctx context.Context, command string, args, reply any, file *os.File) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("qmp %s: %w", command, err)
		}
	}()
	id, answer, err := c.expect()
	if err != nil {
		return err
	}
	defer c.forget(id)
	line, err := encode(command, args, id)
	if err != nil {
		return err
	}

	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.ended()
	}
	if err := c.write(ctx, line, file); err != nil {
		<-c.writing
		return err
	}
	if file == nil {
		<-c.writing
	} else {
		// QEMU keeps the descriptors of the last message only: nothing may be
		// sent behind a file until it was taken.
		defer func() { <-c.writing }()
	}

	select {
	case m := <-answer:
		return m.decode(reply)
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		select {
		case m := <-answer: // it came before the end
			return m.decode(reply)
		default:
			return c.ended()
		}
	}
}

// write sends one line, and gives up with the context. Half a line makes the
// connection worthless: it is closed then. Where QEMU has closed it, there may still
// be events to read, and then its end.
func (c *Client) write(ctx context.Context, line []byte, file *os.File) error {
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(fired)
	})
	err := c.send(line, file)
	if stopped := stop(); err == nil && !stopped {
		// The context ended just behind the line: the next one has its own.
		<-fired
		err = c.conn.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		if !errors.Is(err, syscall.EPIPE) {
			_ = c.conn.Close()
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return nil
}

func (c *Client) send(line []byte, file *os.File) (err error) {
	n := 0
	if file != nil {
		err = control(file, func(fd int) (err error) {
			n, _, err = c.conn.WriteMsgUnix(line, unix.UnixRights(fd), nil)
			return err
		})
	}
	if err == nil && n < len(line) {
		_, err = c.conn.Write(line[n:])
	}
	return err
}

func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := raw.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// expect makes room for the reply to a command.
func (c *Client) expect() (uint64, chan message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending == nil {
		return 0, nil, c.ended()
	}
	c.next++
	answer := make(chan message, 1)
	c.pending[c.next] = answer
	return c.next, answer, nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// ended describes the end of the connection. It needs done closed, or pending
// nil, which comes after err is set.
func (c *Client) ended() error {
	return fmt.Errorf("connection ended: %w: %w", c.err, errdefs.ErrUnavailable)
}

func (c *Client) greet(ctx context.Context, lines *bufio.Scanner) error {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetReadDeadline(time.Unix(1, 0)) })
	m, err := next(lines)
	if !stop() {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	if m.Greeting == nil {
		return errors.New("the first message is not one")
	}
	c.version = m.Greeting.Version.QEMU
	return nil
}

// read is the client's goroutine: it ends with the connection.
func (c *Client) read(lines *bufio.Scanner) {
	err := c.dispatch(lines)
	_ = c.conn.Close()
	c.mu.Lock()
	c.err = err
	c.pending = nil
	c.mu.Unlock()
	close(c.done)
}

func (c *Client) dispatch(lines *bufio.Scanner) error {
	for {
		m, err := next(lines)
		if err != nil {
			return err
		}
		if m.Event != "" {
			c.onEvent(m.event())
			continue
		}
		c.mu.Lock()
		answer := c.pending[m.id()]
		delete(c.pending, m.id())
		c.mu.Unlock()
		if answer != nil { // otherwise its caller has gone
			answer <- m
		}
	}
}

func next(lines *bufio.Scanner) (message, error) {
	if lines.Scan() {
		return parse(lines.Bytes())
	}
	if err := lines.Err(); err != nil {
		return message{}, fmt.Errorf("read: %w", err)
	}
	return message{}, io.EOF
}

func encode(command string, args any, id uint64) ([]byte, error) {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return nil, fmt.Errorf("encode arguments: %w", err)
	}
	return append(line, '\n'), nil
}
