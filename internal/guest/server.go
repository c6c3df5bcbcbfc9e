package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/vsock"
)

const (
	// closeTimeout bounds how long the last answers may take to leave.
	closeTimeout = 2 * time.Second
	// hangUpGrace is what a host has to take them and hang up first: clients of
	// ttrpc may forget an answer when the connection closes right behind it.
	hangUpGrace = 50 * time.Millisecond
)

// A server is what listens, and the sandbox that it serves.
type server struct {
	cfg        Config
	sandbox    *sandbox
	rpc        *ttrpc.Server
	handshakes sync.WaitGroup // stream connections without a container
	connects   chan struct{}  // those into the containers' network
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
	watch, err := newWatcher()
	if err != nil {
		return errors.Join(err, rpc.Close(), streams.Close())
	}
	events, err := newUevents()
	if err != nil {
		return errors.Join(err, rpc.Close(), streams.Close(), watch.close())
	}
	s := &server{cfg: cfg, sandbox: newSandbox(cfg, watch, events), connects: make(chan struct{}, maxConnects)}
	if s.rpc, err = newRPC(s); err != nil {
		return errors.Join(err, rpc.Close(), streams.Close(), watch.close(), events.close())
	}
	var (
		jobs       sync.WaitGroup
		failed     = make(chan error, 4)
		life, stop = context.WithCancel(ctx)
		conns      = newAnsweringListener(rpc)
	)
	jobs.Go(func() { failed <- fmt.Errorf("serve rpc: %w", s.rpc.Serve(life, conns)) })
	jobs.Go(func() { failed <- fmt.Errorf("serve streams: %w", s.serveStreams(life, streams)) })
	jobs.Go(func() { failed <- fmt.Errorf("watch control groups: %w", watch.run()) })
	jobs.Go(func() { failed <- fmt.Errorf("watch devices: %w", events.run()) })
	jobs.Go(func() { s.sayReady(life, events) })

	select {
	case <-s.sandbox.destroyed:
	case <-ctx.Done():
		err = ctx.Err()
	case err = <-failed:
	}
	s.end(ctx)
	stop() // and with it all long calls
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	answered := conns.answered(ctx)
	grace, hungUp := context.WithTimeout(ctx, hangUpGrace)
	conns.closed(grace)
	hungUp()
	err = errors.Join(err, streams.Close(), s.rpc.Close(), watch.close(), events.close())
	jobs.Wait()
	s.handshakes.Wait()
	if !conns.closed(ctx) || !answered {
		log.G(ctx).Warn("connections did not end")
	}
	return err
}

// end destroys the sandbox, unless that was done already or hangs.
func (s *server) end(ctx context.Context) {
	if s.sandbox.setup.tryAcquire() {
		defer s.sandbox.setup.release()
		s.sandbox.destroy(ctx)
	}
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

// sayReady tells the host that the agent serves, over each vsock that the guest
// gets: a machine that goes on from a template has another than the one before.
func (s *server) sayReady(ctx context.Context, events *uevents) {
	if s.cfg.Ready == nil {
		return
	}
	if _, path, _ := parseAddr(s.cfg.Addr); path != "" {
		s.tellReady(ctx)
		return
	}
	var told uint64
	_ = events.await(ctx, func() (bool, error) {
		// A driver that is still probing fails; its next event comes when it is done.
		if device := vsockDevice(); device != told && (device == 0 || s.tellReady(ctx)) {
			told = device
		}
		return false, nil
	})
}

func (s *server) tellReady(ctx context.Context) bool {
	err := s.cfg.Ready(ctx)
	switch l := log.G(ctx).WithError(err); {
	case err == nil, ctx.Err() != nil:
	case errors.Is(err, unix.ENODEV):
		l.Debug("host not told yet that the agent serves")
	default:
		l.Warn("host not told that the agent serves")
	}
	return err == nil
}

// vsockDevice is a number that no other vsock device of this guest has had, the
// inode of its directory; 0: there is none. Names are used again.
func vsockDevice() uint64 {
	const driver = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"
	devices, _ := filepath.Glob(driver + "/virtio*") // the pattern is right
	for _, device := range devices {
		var st unix.Stat_t
		if unix.Stat(device, &st) == nil {
			return st.Ino
		}
	}
	return 0
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

// CheckAddr says whether Config.Addr can be used.
func CheckAddr(addr string) error {
	_, _, err := parseAddr(addr)
	return err
}

// parseAddr returns a vsock port, or the path of a unix socket.
func parseAddr(addr string) (port uint32, path string, err error) {
	if addr == "" {
		return extension.AgentPort, "", nil
	}
	kind, rest, _ := strings.Cut(addr, "://")
	switch {
	case kind == "unix" && rest != "":
		return 0, rest, nil
	case kind == "vsock":
		_, number, _ := strings.Cut(rest, ":")
		n, err := strconv.ParseUint(number, 10, 32)
		if err == nil && n != 0 && n != extension.StreamPort {
			return uint32(n), "", nil
		}
	}
	return 0, "", invalid("address %q", addr)
}
