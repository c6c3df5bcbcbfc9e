package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
)

// Try says why links cannot become cards on this host, as found out with a link
// in a namespace that nobody else sees. It needs root. vhost says whether the
// kernel would move the packets.
func Try(cfg Config) (vhost bool, err error) {
	n, err := newNamespace()
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	const name = "eth0"
	if err := n.handle.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1500}, PeerName: "peer"}); err != nil {
		return false, fmt.Errorf("add veth: %w", err)
	}
	link, err := n.handle.LinkByName(name)
	if err != nil {
		return false, fmt.Errorf("find veth: %w", err)
	}
	a, err := n.Attach(LinkID{link.Attrs().Index, name}, "try", 1, cfg)
	if err != nil {
		return false, err
	}
	return len(a.Vhost) > 0, a.Close()
}

// newNamespace makes one that goes when it is closed, with what is in it.
func newNamespace() (n *Namespace, _ error) {
	err := thread.Run(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", os.NewSyscallError("unshare", err))
		}
		n, err = Open("/proc/thread-self/ns/net")
		return err
	})
	return n, err
}
