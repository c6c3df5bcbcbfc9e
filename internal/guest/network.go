package guest

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A network is the sandbox': a pinned namespace that all containers join. Hosts
// configure it before they create the sandbox, so the first call that needs it
// makes it. Cards appear outside, where the agent is, and are moved inside.
type network struct {
	devices *devices
	outside *namespace // nil: the agent's own
	change  lock       // held by calls that change something

	mu     sync.Mutex
	inside *namespace // guarded by mu
	closed bool       // guarded by mu
}

func newNetwork(d *devices) *network { return &network{devices: d, change: newLock()} }

// pin returns the namespace.
func (n *network) pin() (*namespace, error) {
	if ns, err := n.pinned(); ns != nil || err != nil {
		return ns, err
	}
	ns, err := pinNetwork()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || n.inside != nil { // somebody was faster
		err := ns.close()
		if n.closed {
			err = errors.Join(errDestroyed, err)
		}
		return n.inside, err
	}
	n.inside = ns
	return ns, nil
}

var errDestroyed = precondition("the sandbox is being destroyed")

func (n *network) pinned() (*namespace, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, errDestroyed
	}
	return n.inside, nil
}

// close lets go of the namespace, and of what is in it when nobody else is.
func (n *network) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	err := n.inside.close()
	n.inside = nil
	return err
}

// look calls f with a netlink handle of the namespace.
func (n *network) look(f func(*netlink.Handle) error) error {
	ns, err := n.pin()
	if err != nil {
		return err
	}
	h, err := ns.netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	return f(h)
}

// alter does the same for f that changes something, while no one else does.
func (n *network) alter(ctx context.Context, f func(*netlink.Handle) error) error {
	if err := n.change.acquire(ctx); err != nil {
		return err
	}
	defer n.change.release()
	return n.look(f)
}

// netlink opens a handle in a network namespace; nil is the agent's.
func (n *namespace) netlink() (h *netlink.Handle, err error) {
	if nerr := n.handle(func(ns netns.NsHandle) {
		h, err = netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	}); nerr != nil {
		return nil, nerr
	}
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return h, nil
}

// linkEvents tells of changes of links in a network namespace until stop.
func (n *namespace) linkEvents() (events <-chan netlink.LinkUpdate, stop func(), err error) {
	ch, done := make(chan netlink.LinkUpdate), make(chan struct{})
	if nerr := n.handle(func(ns netns.NsHandle) {
		err = netlink.LinkSubscribeAt(ns, ch, done)
	}); nerr != nil {
		return nil, nil, nerr
	}
	if err != nil {
		return nil, nil, fmt.Errorf("subscribe to links: %w", err)
	}
	return ch, func() {
		close(done)
		for range ch { // the sender closes it at its end
		}
	}, nil
}

// handle calls f with what the netlink library knows a namespace by.
func (n *namespace) handle(f func(netns.NsHandle)) error {
	if n == nil {
		f(netns.None())
		return nil
	}
	return n.control(func(fd int) { f(netns.NsHandle(fd)) })
}
