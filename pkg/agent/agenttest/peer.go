// Package agenttest is the guest's side of the agent protocol for tests of the
// host's: a real ttrpc server on real sockets, with processes that are
// functions of the test (Peer), or bytes as a hostile guest would send them
// (Serve and the frames). It behaves as the protocol document says, with or
// without this project's extensions.
package agenttest

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// Options make a Peer.
type Options struct {
	// Plain leaves out what this project adds to the protocol.
	Plain bool
	// Program is what every process runs; its result is the exit code. Nil
	// waits for a signal.
	Program func(ctx context.Context, p *Process) int
}

// A Call is one request as it arrived.
type Call struct {
	Method  string // without the service
	Request proto.Message
}

// A Handler answers one method.
type Handler func(ctx context.Context, req proto.Message) (proto.Message, error)

// A Peer is a guest's agent.
type Peer struct {
	opts      Options
	context   func() context.Context // the test's
	server    *ttrpc.Server
	listeners map[uint32]*listener
	jobs      sync.WaitGroup

	mu        sync.Mutex
	handlers  map[string]Handler     // guarded by mu
	calls     []Call                 // guarded by mu
	processes map[[2]string]*Process // guarded by mu
	pipes     []*os.File             // guarded by mu
	oom       chan string
}

// Start starts a peer, which ends with the test.
func Start(tb testing.TB, opts Options) *Peer {
	tb.Helper()
	server, err := ttrpc.NewServer()
	if err != nil {
		tb.Fatal(err)
	}
	p := &Peer{
		opts:    opts,
		context: tb.Context,
		server:  server,
		listeners: map[uint32]*listener{
			extension.AgentPort:  newListener(),
			extension.StreamPort: newListener(),
		},
		handlers:  map[string]Handler{},
		processes: map[[2]string]*Process{},
		oom:       make(chan string, 16),
	}
	p.handleDefaults()
	p.register(protocol.File_pkg_agent_protocol_agent_proto)
	p.register(protocol.File_pkg_agent_protocol_health_proto)
	if !opts.Plain {
		p.register(extension.File_pkg_agent_protocol_extension_extension_proto)
		p.jobs.Go(p.serveStreams)
	}
	p.jobs.Go(func() { _ = server.Serve(tb.Context(), p.listeners[extension.AgentPort]) }) // ends by Close
	tb.Cleanup(func() {
		_ = server.Close()
		for _, l := range p.listeners {
			_ = l.Close()
		}
		p.jobs.Wait()
		for _, f := range p.pipes {
			_ = f.Close() // again, for those that are closed
		}
	})
	return p
}

// register serves every method of the file's services.
func (p *Peer) register(file protoreflect.FileDescriptor) {
	for i := range file.Services().Len() {
		service := file.Services().Get(i)
		methods := map[string]ttrpc.Method{}
		for j := range service.Methods().Len() {
			m := service.Methods().Get(j)
			input, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
			if err != nil {
				panic(err) // the generated code registers them all
			}
			output, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
			if err != nil {
				panic(err)
			}
			methods[string(m.Name())] = p.method(string(m.Name()), input, output)
		}
		p.server.Register(string(service.FullName()), methods)
	}
}

func (p *Peer) method(name string, input, output protoreflect.MessageType) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := input.New().Interface()
		if err := unmarshal(req); err != nil {
			return nil, err
		}
		p.mu.Lock()
		p.calls = append(p.calls, Call{name, req})
		h := p.handlers[name]
		p.mu.Unlock()
		if h != nil {
			answer, err := h(ctx, req)
			return answer, errgrpc.ToGRPC(err)
		}
		if answer := output.New().Interface(); proto.Equal(answer, &emptypb.Empty{}) {
			return answer, nil
		}
		return nil, status.Error(codes.Unimplemented, name+" is not here")
	}
}

// Handle replaces what answers a method. Without a handler, methods that
// answer nothing succeed, and the others are not implemented.
func (p *Peer) Handle(method string, h Handler) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handlers[method] = h
}

// Handle is Peer.Handle for a function of the method's own types.
func Handle[Q, A proto.Message](p *Peer, method string, f func(context.Context, Q) (A, error)) {
	p.Handle(method, func(ctx context.Context, req proto.Message) (proto.Message, error) {
		return f(ctx, req.(Q))
	})
}

// Calls lists the requests for the given methods, or all of them, in order.
func (p *Peer) Calls(methods ...string) []Call {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.calls), func(c Call) bool {
		return len(methods) > 0 && !slices.Contains(methods, c.Method)
	})
}

// Dial is a vsock.Dialer.
func (p *Peer) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	l := p.listeners[port]
	if l == nil || p.opts.Plain && port == extension.StreamPort {
		return nil, fmt.Errorf("port %d: connection refused", port)
	}
	host, guest, err := socketPair()
	if err != nil {
		return nil, err
	}
	if err := l.push(ctx, guest); err != nil {
		_ = host.Close()
		_ = guest.Close()
		return nil, err
	}
	return host, nil
}

// Connections says how many connections were made to a port so far.
func (p *Peer) Connections(port uint32) int { return p.listeners[port].count() }

// Drop closes every connection to a port from the guest's side.
func (p *Peer) Drop(port uint32) { p.listeners[port].drop() }

// OOM reports an OOM kill in a container.
func (p *Peer) OOM(containerID string) { p.oom <- containerID }

func (p *Peer) handleDefaults() {
	Handle(p, "Check", func(context.Context, *protocol.CheckRequest) (*protocol.HealthCheckResponse, error) {
		return &protocol.HealthCheckResponse{Status: protocol.HealthCheckResponse_SERVING}, nil
	})
	Handle(p, "Version", func(context.Context, *protocol.CheckRequest) (*protocol.VersionCheckResponse, error) {
		return &protocol.VersionCheckResponse{GrpcVersion: "0.0.1", AgentVersion: "4.1.0"}, nil
	})
	Handle(p, "GetGuestDetails", func(context.Context, *protocol.GuestDetailsRequest) (*protocol.GuestDetailsResponse, error) {
		details := &protocol.AgentDetails{Version: "4.1.0", StorageHandlers: strings.Fields("blk scsi virtio-fs ephemeral local")}
		if !p.opts.Plain {
			details.ExtraFeatures = []string{extension.FeatureExtension, extension.FeatureStreams}
		}
		return &protocol.GuestDetailsResponse{MemBlockSizeBytes: 128 << 20, AgentDetails: details}, nil
	})
	Handle(p, "GetOOMEvent", func(ctx context.Context, _ *protocol.GetOOMEventRequest) (*protocol.OOMEvent, error) {
		select {
		case id := <-p.oom:
			return &protocol.OOMEvent{ContainerId: id}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-p.context().Done():
			return nil, p.context().Err()
		}
	})
	p.handleProcesses()
}
