package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// pieceSize is how much one plain call carries. It is the capacity of a pipe.
const pieceSize = 64 << 10

// An output is the reading end of a stream by plain calls.
type output struct {
	turn  turn
	calls series[[]byte] // for whoever has the turn, as all below
	left  []byte         // read from the guest, not yet by anybody here
	ended bool
}

// ReadProcessStdout implements Processes. What a caller that left early asked
// for is given to the next one.
func (c *Client) ReadProcessStdout(ctx context.Context, containerID, execID string, buf []byte) (int, error) {
	return c.peer.Load().readStdout(ctx, processOf(containerID, execID), buf)
}

// ReadProcessStderr implements Processes, as ReadProcessStdout does.
func (c *Client) ReadProcessStderr(ctx context.Context, containerID, execID string, buf []byte) (int, error) {
	return c.peer.Load().readStderr(ctx, processOf(containerID, execID), buf)
}

func (p *peer) readStdout(ctx context.Context, id process, buf []byte) (int, error) {
	return p.read(ctx, id, p.processes.get(id).stdout, service.ReadStdout, buf)
}

func (p *peer) readStderr(ctx context.Context, id process, buf []byte) (int, error) {
	return p.read(ctx, id, p.processes.get(id).stderr, service.ReadStderr, buf)
}

type readMethod = func(service, context.Context, *protocol.ReadStreamRequest) (*protocol.ReadStreamResponse, error)

func (p *peer) read(ctx context.Context, id process, o *output, method readMethod, buf []byte) (int, error) {
	if len(buf) == 0 {
		return 0, nil
	}
	if err := o.turn.take(ctx); err != nil {
		return 0, err
	}
	defer o.turn.give()
	if len(o.left) == 0 && !o.ended {
		data, err := o.calls.next(ctx, p, func(ctx context.Context, l *life) ([]byte, error) {
			answer, err := await(ctx, l, method, &protocol.ReadStreamRequest{
				ContainerId: id.containerID,
				ExecId:      id.execID,
				Len:         pieceSize,
			})
			return answer.GetData(), err
		})
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		o.left, o.ended = data, len(data) == 0
	}
	if o.ended {
		return 0, io.EOF
	}
	n := copy(buf, o.left)
	o.left = o.left[n:]
	return n, nil
}

// An input is the writing end of stdin by plain calls.
type input struct {
	turn  turn
	calls series[uint32] // for whoever has the turn
}

// WriteProcessStdin implements Processes. A piece that a caller left while it
// was on its way may still be written; whatever comes next waits for it.
func (c *Client) WriteProcessStdin(ctx context.Context, containerID, execID string, data []byte) (int, error) {
	return c.peer.Load().writeStdin(ctx, processOf(containerID, execID), data)
}

func (p *peer) writeStdin(ctx context.Context, id process, data []byte) (int, error) {
	in := p.processes.get(id).stdin
	if err := in.turn.take(ctx); err != nil {
		return 0, err
	}
	defer in.turn.give()
	if _, err := in.calls.finish(ctx); err != nil {
		return 0, err
	}
	written := 0
	for written < len(data) { // an empty piece would be the end
		piece := data[written:min(len(data), written+pieceSize)]
		n, err := in.write(ctx, p, id, piece)
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

func (in *input) write(ctx context.Context, p *peer, id process, piece []byte) (int, error) {
	data := bytes.Clone(piece) // the call may outlast the caller, who owns piece
	n, err := in.calls.next(ctx, p, func(ctx context.Context, l *life) (uint32, error) {
		answer, err := await(ctx, l, service.WriteStdin, &protocol.WriteStreamRequest{
			ContainerId: id.containerID,
			ExecId:      id.execID,
			Data:        data,
		})
		return answer.GetLen(), err
	})
	switch {
	case err != nil:
		return 0, err
	case n == 0:
		return 0, &Error{Method: "WriteStdin", Err: io.ErrShortWrite}
	case int64(n) > int64(len(piece)):
		return 0, &Error{Method: "WriteStdin", Err: fmt.Errorf("%w: %w: %d bytes of %d written",
			errdefs.ErrUnavailable, errProtocol, n, len(piece))}
	}
	return int(n), nil
}

// CloseProcessStdin implements Processes. It comes in order, behind a piece
// that is on its way.
func (c *Client) CloseProcessStdin(ctx context.Context, containerID, execID string) error {
	return c.peer.Load().closeStdin(ctx, processOf(containerID, execID))
}

func (p *peer) closeStdin(ctx context.Context, id process) error {
	in := p.processes.get(id).stdin
	if err := in.turn.take(ctx); err != nil {
		return err
	}
	defer in.turn.give()
	if _, err := in.calls.finish(ctx); err != nil && ctx.Err() != nil {
		return err
	}
	return tell(ctx, p, service.CloseStdin, &protocol.CloseStdinRequest{ContainerId: id.containerID, ExecId: id.execID})
}
