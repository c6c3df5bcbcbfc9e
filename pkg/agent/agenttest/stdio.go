package agenttest

import (
	"context"
	"errors"
	"io"
	"net"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

func (p *Peer) handleStdio() {
	read := func(pipe func(*Process) io.Reader) func(context.Context, *protocol.ReadStreamRequest) (*protocol.ReadStreamResponse, error) {
		return func(_ context.Context, req *protocol.ReadStreamRequest) (*protocol.ReadStreamResponse, error) {
			proc, err := p.find(req.GetContainerId(), req.GetExecId())
			if err != nil {
				return nil, err
			}
			data := make([]byte, req.GetLen())
			n, err := pipe(proc).Read(data)
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return &protocol.ReadStreamResponse{Data: data[:n]}, err
		}
	}
	Handle(p, "ReadStdout", read(func(proc *Process) io.Reader { return proc.stdout }))
	Handle(p, "ReadStderr", read(func(proc *Process) io.Reader { return proc.stderr }))
	Handle(p, "WriteStdin", func(_ context.Context, req *protocol.WriteStreamRequest) (*protocol.WriteStreamResponse, error) {
		proc, err := p.find(req.GetContainerId(), req.GetExecId())
		if err != nil {
			return nil, err
		}
		if len(req.GetData()) == 0 {
			return &protocol.WriteStreamResponse{}, proc.stdin.Close()
		}
		n, err := proc.stdin.Write(req.GetData())
		return &protocol.WriteStreamResponse{Len: uint32(n)}, err
	})
	Handle(p, "CloseStdin", func(_ context.Context, req *protocol.CloseStdinRequest) (*emptypb.Empty, error) {
		proc, err := p.find(req.GetContainerId(), req.GetExecId())
		if err != nil {
			return nil, err
		}
		return &emptypb.Empty{}, proc.stdin.Close()
	})
}

func (p *Peer) serveStreams() {
	l := p.listeners[extension.StreamPort]
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		p.jobs.Go(func() {
			defer conn.Close()
			p.serveStream(conn)
		})
	}
}

func (p *Peer) serveStream(conn net.Conn) {
	h, err := extension.ReadStreamHeader(conn)
	if err != nil {
		return
	}
	proc, err := p.find(h.ContainerID, h.ExecID)
	if err != nil {
		_ = extension.WriteStreamAnswer(conn, extension.StreamNotFound, err.Error())
		return
	}
	proc.mu.Lock()
	taken := proc.taken[h.Stream]
	proc.taken[h.Stream] = true
	proc.mu.Unlock()
	if taken {
		_ = extension.WriteStreamAnswer(conn, extension.StreamTaken, "stream has a connection")
		return
	}
	if err := extension.WriteStreamAnswer(conn, extension.StreamOK, ""); err != nil {
		return
	}
	switch h.Stream {
	case extension.Stdin:
		chunks := &extension.ChunkReader{R: conn}
		in := taker{proc.stdin, chunks, &extension.Receipt{W: conn, Worth: extension.WorthReceipt}}
		if _, err := io.Copy(in, chunks); err == nil {
			_ = proc.stdin.Close()
		}
	case extension.Stdout:
		send(conn, proc.stdout)
	case extension.Stderr:
		send(conn, proc.stderr)
	}
}

// A taker takes stdin, and says so.
type taker struct {
	io.Writer
	chunks  *extension.ChunkReader
	receipt *extension.Receipt
}

func (t taker) Write(b []byte) (int, error) {
	n, err := t.Writer.Write(b)
	if err == nil {
		err = t.receipt.Took(t.chunks.Count())
	}
	return n, err
}

// send gives a stream to the host, and waits until it has taken the end.
func send(conn net.Conn, r io.Reader) {
	if _, err := io.Copy(&extension.ChunkWriter{W: conn}, r); err != nil {
		return
	}
	if err := extension.WriteEnd(conn); err == nil {
		_, _ = conn.Read(make([]byte, 1))
	}
}
