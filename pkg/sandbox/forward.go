package sandbox

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// maxForwards bounds the connections that are carried to the guest at the same
// time; more wait to be accepted.
const maxForwards = 128

// forward carries TCP connections that are made in the namespace itself, as
// engines do to forward a port, to the same address in the guest. A guest whose
// agent cannot take them, or a kernel that cannot tell of them, does without.
func (n *podNetwork) forward(ctx context.Context) {
	caps, err := n.s.agent.Capabilities(ctx)
	if err == nil && !caps.Connect {
		err = errdefs.ErrNotImplemented
	}
	if err != nil {
		log.G(ctx).WithError(err).Info("ports are not forwarded: the guest's agent takes no connections")
		return
	}
	l, err := n.ns.Catch(ctx)
	if err != nil {
		log.G(ctx).WithError(err).Warn("ports are not forwarded")
		return
	}
	n.undo.Add(l.Close)
	life := n.life(ctx)
	n.s.jobs.Go(func() { n.s.acceptForwards(life, l.TCPListener) })
}

func (s *Sandbox) acceptForwards(ctx context.Context, l *net.TCPListener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	free := make(chan struct{}, maxForwards)
	for {
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return
		}
		tcp, err := l.AcceptTCP()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				log.G(ctx).WithError(err).Warn("ports are no longer forwarded")
			}
			return
		}
		conns.Go(func() {
			defer func() { <-free }()
			to := tcp.LocalAddr().(*net.TCPAddr).AddrPort()
			to = netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
			if err := s.agent.Connect(ctx, tcp, to); err != nil && ctx.Err() == nil {
				log.G(ctx).WithError(err).Debug("forwarded connection was cut")
			}
		})
	}
}
