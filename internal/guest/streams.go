package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const (
	// handshakeTimeout bounds the header of a stream connection and its answer.
	handshakeTimeout = 10 * time.Second
	// drainGrace is what a connection has at RemoveContainer to deliver what a
	// dead process has written.
	drainGrace = time.Second
)

// serveStreams accepts connections until the listener closes. Each has a
// goroutine of the server until its header is read, then of its container.
func (s *server) serveStreams(ctx context.Context, l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		s.handshakes.Go(func() { s.acceptStream(ctx, conn) })
	}
}

// acceptStream reads the header and hands the connection to its container, or
// carries it on itself.
func (s *server) acceptStream(ctx context.Context, conn net.Conn) {
	conn, err := newPatientConn(conn)
	if err != nil {
		log.G(ctx).WithError(err).Warn("connection of a stream dropped")
		return
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(handshakeTimeout))
	header, err := extension.ReadStreamHeader(conn)
	if err != nil {
		refuse(conn, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err))
		return
	}
	open := s.openStream
	if header.Stream == extension.Connect {
		open = func(ctx context.Context, conn net.Conn, h extension.StreamHeader) error {
			return s.connect(ctx, conn, h.ContainerID)
		}
	}
	if err = open(ctx, conn, header); err != nil {
		log.G(ctx).WithError(err).WithField("container_id", header.ContainerID).Debug("stream refused")
		refuse(conn, err)
	}
}

// refuse says why and closes.
func refuse(conn net.Conn, err error) {
	status := extension.StreamInvalid
	switch {
	case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err):
		status = extension.StreamNotFound
	case errdefs.IsAlreadyExists(err):
		status = extension.StreamTaken
	}
	_ = extension.WriteStreamAnswer(conn, status, bound(err.Error(), extension.MaxMessage-4))
	conn.Close()
}

// openStream takes the stream for the connection and serves it.
func (s *server) openStream(ctx context.Context, conn net.Conn, h extension.StreamHeader) error {
	c, err := s.sandbox.container(h.ContainerID)
	if err != nil {
		return err
	}
	p, err := c.process(h.ExecID)
	if err != nil {
		return err
	}
	if h.Stream == extension.Stdin {
		return c.openInput(ctx, conn, p)
	}
	out := p.io.out
	if h.Stream == extension.Stderr {
		out = p.io.err
	}
	return c.openOutput(ctx, conn, p, out)
}

func (c *container) openInput(ctx context.Context, conn net.Conn, p *process) error {
	in := p.io.in
	if in == nil {
		return notFound("process %q has no stdin", p.id)
	}
	if !in.writer.tryAcquire() {
		return fmt.Errorf("stdin of process %q: %w", p.id, errdefs.ErrAlreadyExists)
	}
	return c.serve(conn, in.writer.release, func() { serveInput(ctx, conn, in) })
}

func (c *container) openOutput(ctx context.Context, conn net.Conn, p *process, out *output) error {
	if out == nil { // stderr of a terminal: there is none, and so it ends
		return c.serve(conn, func() {}, func() { serveNothing(conn) })
	}
	if !out.reader.tryAcquire() {
		return fmt.Errorf("output of process %q: %w", p.id, errdefs.ErrAlreadyExists)
	}
	out.claim()
	return c.serve(conn, out.reader.release, func() {
		if serveOutput(ctx, conn, out) {
			out.delivered()
		}
		c.forget(p)
	})
}

// serve answers and runs f, which owns the connection, in a goroutine of the
// container. The stream is released in any case.
func (c *container) serve(conn net.Conn, release, f func()) error {
	c.mu.Lock()
	if c.streams == nil {
		c.mu.Unlock()
		release()
		return notFound("container %q", c.id)
	}
	c.streams[conn] = struct{}{}
	c.conns.Add(1)
	c.mu.Unlock()
	go func() {
		defer c.conns.Done()
		defer c.detach(conn)
		defer release()
		if extension.WriteStreamAnswer(conn, extension.StreamOK, "") == nil && conn.SetDeadline(time.Time{}) == nil {
			f()
		}
	}()
	return nil
}

func (c *container) detach(conn net.Conn) {
	conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, conn)
}

// serveInput writes what the host sends until the host or the process is done.
// A connection that is cut leaves stdin open.
func serveInput(ctx context.Context, conn net.Conn, in *input) {
	stopped := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-in.closed:
			conn.Close()
		case <-stopped:
		}
	}()
	defer func() {
		close(stopped)
		<-watched
	}()
	r := bufio.NewReaderSize(&bulkReader{Conn: conn}, inputBuffer)
	chunks := &extension.ChunkReader{R: r, Expect: newLowWater(conn).set}
	receipt := &extension.Receipt{W: conn, Worth: extension.WorthReceipt}
	for {
		b, err := chunks.ReadChunk()
		if len(b) > 0 {
			if _, err := in.write(ctx, b); err != nil {
				return // the process does not read any more
			}
			if err := receipt.Took(chunks.Count()); err != nil {
				return
			}
		}
		if errors.Is(err, io.EOF) {
			in.end()
			return
		}
		if err != nil {
			return
		}
	}
}

// serveOutput sends what the process writes, and the end. It says whether all of
// that was delivered; otherwise the rest is there for the next connection.
func serveOutput(ctx context.Context, conn net.Conn, out *output) bool {
	ctx, cancel := context.WithCancel(ctx)
	left := make(chan struct{})
	go func() {
		// The host sends nothing: what is read here is that it has gone.
		_, _ = conn.Read(make([]byte, 1))
		cancel()
		close(left)
	}()
	defer func() {
		conn.Close()
		<-left
	}()
	bulk, chunks := false, make(chunkBuffer, smallBuffer)
	defer func() { chunks.resize(false) }()
	for {
		if bulk {
			yield()
		}
		n, err := out.read(ctx, chunks.room(), bulk)
		if errors.Is(err, io.EOF) {
			// The host closes when it has taken everything.
			err := extension.WriteEnd(conn)
			<-left
			return err == nil
		}
		if err != nil {
			return false
		}
		if rest, err := chunks.send(conn, n); err != nil {
			out.unread(rest)
			return false
		}
		bulk = n >= bulkRead
		chunks.resize(bulk)
	}
}

// serveNothing sends the end at once.
func serveNothing(conn net.Conn) {
	if extension.WriteEnd(conn) == nil {
		_, _ = conn.Read(make([]byte, 1))
	}
}

// closeStreams ends all connections. What dead processes have written has a
// moment to be delivered.
func (c *container) closeStreams(ctx context.Context) {
	c.mu.Lock()
	conns, procs := c.streams, slices.Collect(maps.Values(c.procs))
	c.streams = nil // detach deletes nothing from conns any more
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, drainGrace)
	defer cancel()
	waitFor(ctx, &c.conns)
	for conn := range conns {
		conn.Close()
	}
	c.conns.Wait()
	for _, p := range procs {
		p.io.close()
	}
}
