package plain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// A Client is a host that knows the plain protocol. Calls run beside each other.
type Client struct {
	// Metadata is sent with each call, as hosts send their trace context.
	Metadata map[string]string

	conn    net.Conn
	done    chan struct{}
	writing sync.Mutex

	mu      sync.Mutex
	stream  uint32                // of the last request; guarded by mu
	waiting map[uint32]chan frame // guarded by mu; nil when the connection ended
}

var errClosed = errors.New("connection ended")

// NewClient takes the connection over.
func NewClient(conn net.Conn) *Client {
	c := &Client{conn: conn, done: make(chan struct{}), waiting: map[uint32]chan frame{}}
	go c.receive()
	return c
}

// Close ends the connection and all calls.
func (c *Client) Close() {
	_ = c.conn.Close()
	<-c.done
}

func (c *Client) receive() {
	defer close(c.done)
	for {
		f, err := readFrame(c.conn)
		c.mu.Lock()
		if err != nil {
			for _, answer := range c.waiting {
				close(answer)
			}
			c.waiting = nil
			c.mu.Unlock()
			return
		}
		answer := c.waiting[f.stream]
		delete(c.waiting, f.stream)
		c.mu.Unlock()
		if answer != nil && f.kind == response {
			answer <- f // holds one
		}
	}
}

// Call makes one call. An answer that is an error is a *Status.
func (c *Client) Call(ctx context.Context, service, method string, req Msg) (Fields, error) {
	answer, err := c.send(ctx, service, method, req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	select {
	case f, ok := <-answer:
		if !ok {
			return nil, fmt.Errorf("%s: %w", method, errClosed)
		}
		return open(f)
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", method, ctx.Err())
	}
}

func (c *Client) send(ctx context.Context, service, method string, req Msg) (chan frame, error) {
	// ttrpc.Request: service 1, method 2, payload 3, timeout_nano 4, metadata 5.
	body := Msg{}.Str(1, service).Str(2, method).Sub(3, req)
	if deadline, ok := ctx.Deadline(); ok {
		body = body.Int(4, uint64(time.Until(deadline)))
	}
	for k, v := range c.Metadata {
		body = body.Sub(5, Msg{}.Str(1, k).Str(2, v))
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	answer := make(chan frame, 1)
	c.mu.Lock()
	if c.waiting == nil {
		c.mu.Unlock()
		return nil, errClosed
	}
	if c.stream == 0 {
		c.stream = 1 // a client's streams are odd
	} else {
		c.stream += 2
	}
	f := frame{stream: c.stream, kind: request, body: body}
	c.waiting[f.stream] = answer
	c.mu.Unlock()
	_, err := c.conn.Write(f.bytes())
	return answer, err
}

// open takes the answer out of a response: status 1 {code 1, message 2}, payload 2.
func open(f frame) (Fields, error) {
	resp, err := Decode(f.body)
	if err != nil {
		return nil, err
	}
	if st := resp.Sub(1); st.Int(1) != 0 {
		return nil, &Status{Code: st.Int(1), Text: st.Str(2)}
	}
	return Decode(resp.last(2).Bytes)
}
