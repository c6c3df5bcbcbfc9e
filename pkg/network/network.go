// Package network makes the interfaces of a pod's network namespace the cards of
// a machine. A Snapshot says what is in the namespace, NewPlan (pure) what the
// guest shall have of it, and Attach puts a tap behind a link, by which a
// machine has its frames.
//
// Whoever fills the namespace, a CNI plugin or an engine, sees what it made: the
// links stay where they are, with their addresses, and only their frames go to
// the machine.
package network

import (
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
)

// A Model is how frames get from a link to the machine and back.
type Model string

// The models.
const (
	// TC redirects what arrives at a link to a tap beside it, and back, by
	// filters of traffic control.
	TC Model = "tc"
	// Macvtap puts a macvtap upon the link.
	Macvtap Model = "macvtap"
	// None leaves the machine without cards.
	None Model = "none"
)

// Config is the operator's choice.
type Config struct {
	Model Model // empty: TC
	// Vhost says who moves the packets: "on" (the kernel, by /dev/vhost-net),
	// "off" (QEMU), or "auto", which is also the meaning of empty: the kernel
	// where it can.
	Vhost string
}

// Validate reports a word that is none of these.
func (c Config) Validate() error {
	switch c.Model {
	case "", TC, Macvtap, None:
	default:
		return fmt.Errorf("network model %q is not tc, macvtap or none: %w", c.Model, errdefs.ErrInvalidArgument)
	}
	switch c.Vhost {
	case "", "auto", "on", "off":
	default:
		return fmt.Errorf("vhost-net %q is not auto, on or off: %w", c.Vhost, errdefs.ErrInvalidArgument)
	}
	return nil
}

// A Snapshot is what is in a network namespace.
type Snapshot struct {
	Links     []Link
	Routes    []Route
	Neighbors []Neighbor
}

// A Link is a network interface.
type Link struct {
	Index  int
	Name   string
	Kind   string // as rtnetlink has it: "veth", "macvlan"; "device" for hardware
	Alias  string
	MAC    string // empty: has none
	MTU    int
	Master int  // index of the link that it is a port of
	Ether  bool // carries Ethernet frames
	Up     bool
	NoARP  bool
	Addrs  []Address
}

// An Address is one of a link's.
type Address struct {
	netip.Prefix
	// Temporary says that the kernel gave it for a while: by a router's
	// advertisement, or a DHCP client told it how long.
	Temporary bool
}

// A Route is a unicast route with one next hop. A default route has the
// destination 0.0.0.0/0 or ::/0.
type Route struct {
	Dst      netip.Prefix
	Gateway  netip.Addr // zero: none
	Source   netip.Addr // zero: none
	Link     int
	Table    int
	Priority int // metric
	Protocol int // who made it: RTPROT_…
	Scope    int
	MTU      int
	OnLink   bool
}

// A Neighbor is a permanent entry of the table of neighbours.
type Neighbor struct {
	IP   netip.Addr
	Link int
	MAC  string
}
