package network

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// A Plan is what a guest shall have of a pod's network namespace.
type Plan struct {
	Endpoints []Endpoint // by index of their links
	Routes    []*types.Route
	Neighbors []*types.ARPNeighbor
	// LeftOut names what the guest does not get, for a warning.
	LeftOut []string
}

// An Endpoint is a link that becomes a card.
type Endpoint struct {
	LinkID
	MAC string
	MTU int
	// Interface is what the guest's agent is told.
	Interface *types.Interface
}

// A LinkID names a link of a namespace: an index is used again.
type LinkID struct {
	Index int    `json:"index"`
	Name  string `json:"name"`
}

// NewPlan is pure. Links that are down are not planned: who fills a namespace
// sets one up when it is what it shall be.
func NewPlan(s *Snapshot) *Plan {
	p := &Plan{}
	names := map[int]string{}
	for _, l := range s.Links {
		switch why := l.excluded(); why {
		case "":
			names[l.Index] = l.Name
			p.Endpoints = append(p.Endpoints, l.endpoint())
		case silently:
		default:
			p.LeftOut = append(p.LeftOut, fmt.Sprintf("interface %s: %s", l.Name, why))
		}
	}
	slices.SortFunc(p.Endpoints, func(a, b Endpoint) int { return a.Index - b.Index })
	for _, r := range s.Routes {
		if name, ok := names[r.Link]; ok && !r.kernels() {
			p.addRoute(r, name)
		}
	}
	for _, n := range s.Neighbors {
		if name, ok := names[n.Link]; ok && n.MAC != "" {
			p.Neighbors = append(p.Neighbors, &types.ARPNeighbor{
				ToIPAddress: &types.IPAddress{Family: familyOf(n.IP), Address: n.IP.String()},
				Device:      name, Lladdr: n.MAC, State: unix.NUD_PERMANENT,
			})
		}
	}
	return p
}

// silently is the reason for what nobody misses.
const silently = "silently"

// excluded says why a link does not become a card; empty: it does.
func (l Link) excluded() string {
	switch {
	case !l.Up, l.Name == "lo", strings.HasPrefix(l.Alias, aliasPrefix):
		return silently
	case l.Kind == "bridge" || l.Kind == "ifb":
		return fmt.Sprintf("a %s has its traffic inside the host", l.Kind)
	case l.Master != 0:
		return "is a port of another one"
	case !l.Ether || l.MAC == "":
		return fmt.Sprintf("a %s carries no Ethernet frames", l.Kind)
	}
	return ""
}

func (l Link) endpoint() Endpoint {
	e := Endpoint{LinkID: LinkID{l.Index, l.Name}, MAC: l.MAC, MTU: l.MTU}
	e.Interface = &types.Interface{Device: l.Name, Name: l.Name, HwAddr: l.MAC, Mtu: uint64(l.MTU)}
	if l.NoARP {
		e.Interface.RawFlags = unix.IFF_NOARP
	}
	for _, a := range l.Addrs {
		if l.guestMakes(a) {
			continue
		}
		e.Interface.IPAddresses = append(e.Interface.IPAddresses, &types.IPAddress{
			Family: familyOf(a.Addr()), Address: a.Addr().String(), Mask: strconv.Itoa(a.Bits()),
		})
	}
	return e
}

// guestMakes says that the guest's kernel will have the address by itself: from
// the same routers' advertisements, or from the same MAC.
func (l Link) guestMakes(a Address) bool {
	if a.Addr().Is4() {
		return false
	}
	return a.Temporary || a.Addr() == linkLocal(l.MAC)
}

// linkLocal is the address that the kernel derives from a MAC (RFC 4291,
// appendix A).
func linkLocal(mac string) netip.Addr {
	m, err := net.ParseMAC(mac)
	if err != nil || len(m) != 6 {
		return netip.Addr{}
	}
	a := [16]byte{0: 0xfe, 1: 0x80, 11: 0xff, 12: 0xfe}
	copy(a[8:], m[:3])
	copy(a[13:], m[3:])
	a[8] ^= 2
	return netip.AddrFrom16(a)
}

// kernels says that a kernel makes the route by itself.
func (r Route) kernels() bool {
	switch r.Protocol {
	case unix.RTPROT_KERNEL, unix.RTPROT_RA, unix.RTPROT_REDIRECT:
		return true
	}
	return r.Table == unix.RT_TABLE_LOCAL
}

func (p *Plan) addRoute(r Route, device string) {
	if r.Table != unix.RT_TABLE_MAIN {
		p.LeftOut = append(p.LeftOut, fmt.Sprintf("route %s of table %d", r.Dst, r.Table))
		return
	}
	out := &types.Route{Device: device, Family: familyOf(r.Dst.Addr()), Mtu: uint32(r.MTU)}
	if r.Dst.Addr().Is4() {
		out.Scope = uint32(r.Scope)
	}
	if r.Dst.Bits() > 0 {
		out.Dest = r.Dst.String()
	}
	if r.Gateway.IsValid() {
		out.Gateway = r.Gateway.String()
	}
	if r.Source.IsValid() {
		out.Source = r.Source.String()
	}
	if r.OnLink {
		out.Flags = unix.RTNH_F_ONLINK
	}
	p.Routes = append(p.Routes, out)
}

func familyOf(ip netip.Addr) types.IPFamily {
	if ip.Is6() {
		return types.IPFamily_v6
	}
	return types.IPFamily_v4
}
