package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// Streams implements Processes.
func (c *Client) Streams(ctx context.Context, containerID, execID string, want StreamSet) (*Streams, error) {
	p, id := c.peer.Load(), processOf(containerID, execID)
	caps, err := p.caps(ctx)
	if err != nil {
		return nil, err
	}
	l, err := p.enter()
	if err != nil {
		return nil, &Error{Err: err}
	}
	defer l.leave()
	var s *Streams
	var drains []<-chan struct{}
	if caps.ByteStreams {
		s, err = l.byteStreams(ctx, id, want)
	} else {
		s, drains = l.plainStreams(ctx, id, want)
	}
	if err != nil {
		return nil, &Error{Err: err}
	}
	p.processes.opened(id, s.cut, drains)
	return s, nil
}

// byteStreams opens a connection for each stream, all at once.
func (l *life) byteStreams(ctx context.Context, id process, want StreamSet) (*Streams, error) {
	ctx, cancel := l.peer.current().bound(ctx)
	defer cancel()
	wanted := [...]bool{extension.Stdin: want.Stdin, extension.Stdout: want.Stdout, extension.Stderr: want.Stderr}
	var lines [len(wanted)]*line
	var readers [len(wanted)]*bufio.Reader
	var g errgroup.Group
	for stream := range wanted {
		if !wanted[stream] {
			continue
		}
		g.Go(func() (err error) {
			lines[stream], readers[stream], err = l.openStream(ctx, id, byte(stream))
			return err
		})
	}
	err := g.Wait()
	s := &Streams{}
	for stream, n := range lines {
		switch {
		case n == nil:
			continue
		case stream == extension.Stdin && err == nil:
			s.Stdin = newByteInput(l, n, readers[stream])
		case stream == extension.Stdout:
			s.Stdout = newByteOutput(n, readers[stream])
		case stream == extension.Stderr:
			s.Stderr = newByteOutput(n, readers[stream])
		}
		s.cut = append(s.cut, func() { n.fail(errClosed) })
	}
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// openStream dials and shakes hands.
func (l *life) openStream(ctx context.Context, id process, stream byte) (*line, *bufio.Reader, error) {
	conn, err := l.dial(ctx, extension.StreamPort)
	if err != nil {
		return nil, nil, err
	}
	n := newLine(l, conn)
	started := time.Now()
	stop := context.AfterFunc(ctx, func() { n.fail(waited(ctx, "no answer", started)) })
	r := bufio.NewReaderSize(&bulkReader{n.Conn}, smallRead)
	err = handshake(n, r, extension.StreamHeader{Stream: stream, ContainerID: id.containerID, ExecID: id.execID})
	if !stop() && err == nil {
		err = waited(ctx, "no answer", started)
	}
	if err != nil {
		n.fail(err)
		return nil, nil, fmt.Errorf("stream %d: %w", stream, n.cause)
	}
	return n, r, nil
}

func handshake(n *line, r io.Reader, h extension.StreamHeader) error {
	if err := extension.WriteStreamHeader(n.Conn, h); err != nil {
		if errors.Is(err, extension.ErrMalformed) {
			return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
		}
		return n.lost(err)
	}
	status, text, err := extension.ReadStreamAnswer(r)
	if errors.Is(err, extension.ErrMalformed) {
		return fmt.Errorf("%w: %w: %w", errdefs.ErrUnavailable, errProtocol, err)
	}
	if err != nil {
		return n.lost(err)
	}
	class := map[extension.StreamStatus]error{
		extension.StreamNotFound: errdefs.ErrNotFound,
		extension.StreamTaken:    errdefs.ErrAlreadyExists,
		extension.StreamInvalid:  errdefs.ErrInvalidArgument,
	}[status]
	switch {
	case status == extension.StreamOK:
		return nil
	case class != nil:
		return fmt.Errorf("guest: %s: %w", quote(text), class)
	default:
		return fmt.Errorf("%w: %w: answer %d", errdefs.ErrUnavailable, errProtocol, status)
	}
}
