package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// Standard streams by one call per piece, for hosts without stream connections.

// maxRead bounds the answer to a read; a message holds 4 MiB.
const maxRead = 1 << 20

// WriteStdin implements the protocol. Empty data is the end of input.
func (s *service) WriteStdin(ctx context.Context, req *protocol.WriteStreamRequest) (*protocol.WriteStreamResponse, error) {
	p, err := s.process(req)
	if err != nil {
		return nil, err
	}
	in := p.io.in
	if in == nil {
		return nil, precondition("process %q has no stdin", p.id)
	}
	if err := in.writer.acquire(ctx); err != nil {
		return nil, err
	}
	defer in.writer.release()
	if len(req.GetData()) == 0 {
		in.end()
		return &protocol.WriteStreamResponse{}, nil
	}
	n, err := in.write(ctx, req.GetData())
	if errors.Is(err, os.ErrClosed) {
		err = precondition("stdin is closed")
	}
	if err != nil {
		return nil, fmt.Errorf("write stdin of process %q: %w", p.id, err)
	}
	return &protocol.WriteStreamResponse{Len: uint32(n)}, nil
}

// CloseStdin implements the protocol.
func (s *service) CloseStdin(ctx context.Context, req *protocol.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := s.process(req)
	if err != nil {
		return nil, err
	}
	if in := p.io.in; in != nil {
		if err := in.writer.acquire(ctx); err != nil {
			return nil, err
		}
		defer in.writer.release()
		in.end()
	}
	return &emptypb.Empty{}, nil
}

// ReadStdout implements the protocol.
func (s *service) ReadStdout(ctx context.Context, req *protocol.ReadStreamRequest) (*protocol.ReadStreamResponse, error) {
	return s.read(ctx, req, func(io *stdio) *output { return io.out })
}

// ReadStderr implements the protocol.
func (s *service) ReadStderr(ctx context.Context, req *protocol.ReadStreamRequest) (*protocol.ReadStreamResponse, error) {
	return s.read(ctx, req, func(io *stdio) *output { return io.err })
}

func (s *service) read(ctx context.Context, req *protocol.ReadStreamRequest, which func(*stdio) *output) (*protocol.ReadStreamResponse, error) {
	if req.GetLen() == 0 {
		return nil, invalid("read of 0 bytes")
	}
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	p, err := c.process(req.GetExecId())
	if err != nil {
		return nil, err
	}
	out := which(p.io)
	if out == nil { // stderr of a terminal
		return &protocol.ReadStreamResponse{}, nil
	}
	if err := out.reader.acquire(ctx); err != nil {
		return nil, err
	}
	defer out.reader.release()
	out.claim()
	buf := make([]byte, min(req.GetLen(), maxRead))
	n, err := out.read(ctx, [][]byte{buf}, false)
	switch {
	case errors.Is(err, io.EOF):
		out.delivered()
		c.forget(p)
		return &protocol.ReadStreamResponse{}, nil
	case err != nil:
		return nil, fmt.Errorf("read output of process %q: %w", p.id, err)
	case ctx.Err() != nil:
		// Nobody gets this answer any more.
		out.unread(buf[:n])
		return nil, ctx.Err()
	}
	return &protocol.ReadStreamResponse{Data: buf[:n]}, nil
}

// TtyWinResize implements the protocol.
func (s *service) TtyWinResize(_ context.Context, req *protocol.TtyWinResizeRequest) (*emptypb.Empty, error) {
	if err := checkWinsize(req.GetRow(), req.GetColumn()); err != nil {
		return nil, err
	}
	p, err := s.process(req)
	if err != nil {
		return nil, err
	}
	if err := p.io.resize(uint16(req.GetRow()), uint16(req.GetColumn())); err != nil {
		return nil, fmt.Errorf("resize terminal of process %q: %w", p.id, err)
	}
	return &emptypb.Empty{}, nil
}
