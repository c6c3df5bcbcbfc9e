package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// closeTimeout bounds how long the last answers may take to leave.
const closeTimeout = 2 * time.Second

// A server is what listens, and the sandbox that it serves.
type server struct {
	cfg        Config
	sandbox    *sandbox
	rpc        *ttrpc.Server
	handshakes sync.WaitGroup // stream connections without a container yet
}

// Serve serves until DestroySandbox was carried out, and then returns nil: the
// machine is to be powered off. It also returns when ctx ends, with its error.
func Serve(ctx context.Context, cfg Config) error {
	cfg = cfg.withDefaults()
	rpc, streams, err := listen(cfg.Addr)
	if err != nil {
		return err
	}
	return serve(ctx, cfg, rpc, streams)
}

func serve(ctx context.Context, cfg Config, rpc, streams net.Listener) (err error) {
	defer rpc.Close()
	defer streams.Close()
	watch, err := newWatcher()
	if err != nil {
		return err
	}
	s := &server{cfg: cfg, sandbox: newSandbox(cfg, watch)}
	if s.rpc, err = newRPC(s); err != nil {
		return errors.Join(err, watch.close())
	}
	var (
		jobs       sync.WaitGroup
		failed     = make(chan error, 3)
		life, stop = context.WithCancel(ctx)
		conns      = &countingListener{Listener: rpc}
	)
	jobs.Go(func() { failed <- fmt.Errorf("serve rpc: %w", s.rpc.Serve(life, conns)) })
	jobs.Go(func() { failed <- fmt.Errorf("serve streams: %w", s.serveStreams(life, streams)) })
	jobs.Go(func() { failed <- fmt.Errorf("watch control groups: %w", watch.run()) })
	jobs.Go(func() { s.sayReady(life) })

	select {
	case <-s.sandbox.destroyed:
	case <-ctx.Done():
		err = ctx.Err()
	case err = <-failed:
	}
	s.shutdown(ctx, stop, conns, streams)
	err = errors.Join(err, watch.close())
	jobs.Wait()
	return err
}

// shutdown ends what serve has started. Long calls end with their context, then
// the last answers leave.
func (s *server) shutdown(ctx context.Context, stop func(), conns *countingListener, streams net.Listener) {
	if s.sandbox.setup.tryAcquire() {
		s.sandbox.destroy(ctx)
		s.sandbox.setup.release()
	}
	stop()
	streams.Close()
	_ = s.rpc.Close() // connections close when they have answered
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	if !waitFor(ctx, &conns.conns) {
		log.G(ctx).Warn("connections did not end")
	}
	s.handshakes.Wait()
}

func newRPC(s *server) (*ttrpc.Server, error) {
	rpc, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(intercept))
	if err != nil {
		return nil, fmt.Errorf("make rpc server: %w", err)
	}
	impl := &service{cfg: s.cfg, sandbox: s.sandbox}
	protocol.RegisterAgentServiceService(rpc, impl)
	protocol.RegisterHealthService(rpc, impl)
	extension.RegisterExtensionService(rpc, impl)
	return rpc, nil
}

func (s *server) sayReady(ctx context.Context) {
	if s.cfg.Ready == nil {
		return
	}
	if err := s.cfg.Ready(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("host not told that the agent serves")
	}
}

// listen opens the two ports at an address; see Config.Addr.
func listen(addr string) (rpc, streams net.Listener, err error) {
	rpcPort, path, err := parseAddr(addr)
	if err != nil {
		return nil, nil, err
	}
	open := func(port uint32, path string) (net.Listener, error) {
		if path != "" {
			return net.Listen("unix", path) //nolint:noctx // a local name, for tests
		}
		l, err := vsock.ListenGuest(port)
		if err != nil {
			return nil, err
		}
		return piecewiseListener{l}, nil
	}
	if rpc, err = open(rpcPort, path); err != nil {
		return nil, nil, fmt.Errorf("listen for rpc: %w", err)
	}
	if path != "" {
		path += fmt.Sprintf("_%d", extension.StreamPort)
	}
	if streams, err = open(extension.StreamPort, path); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("listen for streams: %w", err), rpc.Close())
	}
	return rpc, streams, nil
}

// parseAddr returns a vsock port, or the path of a unix socket.
func parseAddr(addr string) (port uint32, path string, err error) {
	if addr == "" {
		return extension.AgentPort, "", nil
	}
	u, err := url.Parse(addr)
	if err != nil {
		return 0, "", invalid("address: %s", err)
	}
	switch u.Scheme {
	case "unix":
		if path = u.Host + u.Path; path != "" {
			return 0, path, nil
		}
	case "vsock":
		var cid int
		if n, _ := fmt.Sscanf(u.Host, "%d:%d", &cid, &port); n == 2 && port != 0 && port != extension.StreamPort {
			return port, "", nil
		}
	}
	return 0, "", invalid("address %q", addr)
}

// A countingListener knows how many of its connections are open.
type countingListener struct {
	net.Listener
	conns sync.WaitGroup
}

func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.conns.Add(1)
	return &countedConn{Conn: conn, closed: sync.OnceFunc(l.conns.Done)}, nil
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}
