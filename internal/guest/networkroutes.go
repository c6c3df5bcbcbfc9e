package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/rtnetlink"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// A route is what the protocol can say of one: unicast, of a main table. Its
// family is that of the destination, which is 0.0.0.0/0 or ::/0 by default.
type route struct {
	dst      netip.Prefix
	gw, src  netip.Addr // zero: none
	device   string
	scope    uint32
	flags    uint32
	mtu      uint32
	protocol netlink.RouteProtocol // 0 in requests
}

func (r route) String() string {
	text := r.dst.String()
	if r.gw.IsValid() {
		text += " via " + r.gw.String()
	}
	if r.device != "" {
		text += " dev " + r.device
	}
	return text
}

// plain is the route without what only the kernel knows of it, so that two can
// be compared.
func (r route) plain() route {
	r.protocol = 0
	r.flags &= unix.RTNH_F_ONLINK // others are states
	switch {
	case r.dst.Addr().Is6():
		r.scope = 0 // has none
	case !r.gw.IsValid() && r.scope == 0:
		r.scope = unix.RT_SCOPE_LINK // as ip(8) does: else it could reach no gateway
	}
	return r
}

// kernels says whether the kernel made the route by itself.
func (r route) kernels() bool {
	return r.protocol == unix.RTPROT_KERNEL || r.protocol == unix.RTPROT_REDIRECT || r.protocol == unix.RTPROT_RA
}

func parseRoute(in *types.Route) (r route, err error) {
	r = route{device: in.GetDevice(), scope: in.GetScope(), flags: in.GetFlags(), mtu: in.GetMtu()}
	if in.GetGateway() != "" {
		if r.gw, err = parseIP("gateway", in.GetGateway()); err != nil {
			return r, err
		}
	}
	if in.GetSource() != "" {
		if r.src, err = parseIP("source", in.GetSource()); err != nil {
			return r, err
		}
	}
	if r.dst, err = parseDestination(in.GetDest(), r, in.GetFamily()); err != nil {
		return r, err
	}
	if r.device != "" {
		if err := checkLinkName(r.device); err != nil {
			return r, err
		}
	}
	v6 := r.dst.Addr().Is6()
	switch {
	case r.gw.IsValid() && r.gw.Is6() != v6 || r.src.IsValid() && r.src.Is6() != v6:
		return r, invalid("route %s mixes families", r)
	case r.device == "" && !r.gw.IsValid():
		return r, invalid("route %s has neither gateway nor device", r)
	case r.scope > 0xff:
		return r, invalid("route %s has scope %d", r, r.scope)
	case r.mtu > maxMTU:
		return r, invalid("route %s has mtu %d", r, r.mtu)
	}
	return r, nil
}

// parseDestination takes the family of the default route from the addresses that
// it has, else from the request.
func parseDestination(s string, r route, family types.IPFamily) (netip.Prefix, error) {
	if s == "" || s == "default" {
		if family == types.IPFamily_v6 || r.gw.Is6() || r.src.Is6() {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0), nil
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0), nil
	}
	dst, err := netip.ParsePrefix(s)
	if ip, ierr := netip.ParseAddr(s); ierr == nil && ip.Zone() == "" {
		dst, err = netip.PrefixFrom(ip, ip.BitLen()), nil
	}
	if err != nil || dst.Addr().Is4In6() || dst.Masked() != dst {
		return dst, invalid("destination %q", bound(s, 128))
	}
	return dst, nil
}

// toRoute is the protocol's message; the default route has no destination.
func toRoute(r route) *types.Route {
	out := &types.Route{
		Device: r.device, Family: familyOf(r.dst.Addr()), Scope: r.scope, Flags: r.flags, Mtu: r.mtu,
	}
	if r.dst.Bits() > 0 {
		out.Dest = r.dst.String()
	}
	if r.gw.IsValid() {
		out.Gateway = r.gw.String()
	}
	if r.src.IsValid() {
		out.Source = r.src.String()
	}
	return out
}

// A tableEntry is an entry of a table, and the routes in it: several where a
// destination has several next hops.
type tableEntry struct {
	raw    netlink.Route
	routes []route
}

// toTableEntry leaves out what the protocol can't say.
func toTableEntry(raw netlink.Route, name map[int]string) (tableEntry, bool) {
	e := tableEntry{raw: raw}
	if raw.Type != unix.RTN_UNICAST || raw.Via != nil || raw.Encap != nil {
		return e, false
	}
	dst := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if raw.Family == netlink.FAMILY_V6 {
		dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if raw.Dst != nil {
		dst = prefixOf(raw.Dst)
	}
	base := route{
		dst: dst, src: addrOf(raw.Src), scope: uint32(raw.Scope), flags: uint32(raw.Flags), mtu: uint32(raw.MTU), protocol: raw.Protocol,
	}
	hops := raw.MultiPath
	if len(hops) == 0 {
		hops = []*netlink.NexthopInfo{{LinkIndex: raw.LinkIndex, Gw: raw.Gw, Flags: raw.Flags}}
	}
	for _, hop := range hops {
		if hop.Via != nil || hop.Encap != nil {
			return e, false
		}
		r := base
		r.gw, r.device, r.flags = addrOf(hop.Gw), name[hop.LinkIndex], uint32(hop.Flags)
		e.routes = append(e.routes, r)
	}
	return e, true
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// table lists the main tables of both families, in the kernel's order.
func table(h *netlink.Handle) ([]tableEntry, error) {
	_, name, err := linkNames(h)
	if err != nil {
		return nil, err
	}
	var all []tableEntry
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := rtnetlink.Dump(func() ([]netlink.Route, error) { return h.RouteList(nil, family) })
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, raw := range list {
			if e, ok := toTableEntry(raw, name); ok {
				all = append(all, e)
			}
		}
	}
	return all, nil
}

func listRoutes(h *netlink.Handle) (*protocol.Routes, error) {
	entries, err := table(h)
	if err != nil {
		return nil, err
	}
	list := &protocol.Routes{}
	for _, e := range entries {
		for _, r := range e.routes {
			list.Routes = append(list.Routes, toRoute(r))
		}
	}
	return list, nil
}

// ListRoutes implements the protocol: unicast routes of the main tables of both
// families.
func (s *service) ListRoutes(context.Context, *protocol.ListRoutesRequest) (*protocol.Routes, error) {
	var list *protocol.Routes
	err := s.sandbox.network.look(func(h *netlink.Handle) (err error) {
		list, err = listRoutes(h)
		return err
	})
	return list, err
}

// UpdateRoutes implements the protocol: the main tables have the routes of the
// request then, and those that the kernel makes by itself.
func (s *service) UpdateRoutes(ctx context.Context, req *protocol.UpdateRoutesRequest) (*protocol.Routes, error) {
	if n := len(req.GetRoutes().GetRoutes()); n > maxAddress {
		return nil, invalid("%d routes", n)
	}
	var want []route
	for _, in := range req.GetRoutes().GetRoutes() {
		r, err := parseRoute(in)
		if err != nil {
			return nil, err
		}
		if r = r.plain(); !slices.Contains(want, r) {
			want = append(want, r)
		}
	}
	var list *protocol.Routes
	err := s.sandbox.network.alter(ctx, func(h *netlink.Handle) error {
		err := setRoutes(h, want)
		if err == nil {
			list, err = listRoutes(h)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("update routes: %w", err)
	}
	return list, nil
}

func setRoutes(h *netlink.Handle, want []route) error {
	index, _, err := linkNames(h)
	if err != nil {
		return err
	}
	for _, r := range want {
		if r.device != "" && index[r.device] == 0 {
			return notFound("route %s: interface %q", r, r.device)
		}
	}
	have, err := table(h)
	if err != nil {
		return err
	}
	remove, add := planRoutes(want, have)
	for i, e := range remove {
		// Some go with others.
		if err := h.RouteDel(&e.raw); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route %s (change %d of %d): %w", e.routes[0], i+1, len(remove)+len(add), err)
		}
	}
	for i, r := range add {
		set := h.RouteAppend
		if r.first {
			set = h.RouteReplace // in place of the kernel's, if it has one
		}
		if err := set(r.raw(index[r.device])); err != nil {
			return fmt.Errorf("add route %s (change %d of %d): %w", r, len(remove)+i+1, len(remove)+len(add), err)
		}
	}
	return nil
}

func (r route) raw(index int) *netlink.Route {
	raw := &netlink.Route{
		LinkIndex: index, Dst: toIPNet(r.dst), Scope: netlink.Scope(r.scope), Flags: int(r.flags), MTU: int(r.mtu),
	}
	if r.gw.IsValid() {
		raw.Gw = r.gw.AsSlice()
	}
	if r.src.IsValid() {
		raw.Src = r.src.AsSlice()
	}
	return raw
}

// An addition is a route to add: the first to its destination, or one more.
type addition struct {
	route
	first bool
}

// planRoutes says what to remove and then to add, so that the table is what is
// wanted. A destination whose routes are right, order included, is left alone.
func planRoutes(want []route, have []tableEntry) (remove []tableEntry, add []addition) {
	wanted := map[netip.Prefix][]route{}
	for _, r := range want {
		wanted[r.dst] = append(wanted[r.dst], r)
	}
	there, right := map[netip.Prefix][]route{}, map[netip.Prefix]bool{}
	for _, e := range have {
		for _, r := range e.routes {
			there[r.dst] = append(there[r.dst], r.plain())
		}
	}
	for dst, routes := range wanted {
		right[dst] = slices.Equal(routes, there[dst])
	}
	stay := map[route]bool{}
	kept := map[netip.Prefix]bool{}
	for _, e := range have {
		for _, r := range e.routes {
			if r.kernels() && slices.Contains(wanted[r.dst], r.plain()) {
				stay[r.plain()], kept[r.dst] = true, true
			}
		}
		if r := e.routes[0]; !r.kernels() && !right[r.dst] {
			remove = append(remove, e)
		}
	}
	for _, r := range want {
		if !right[r.dst] && !stay[r] {
			add = append(add, addition{r, !kept[r.dst]})
			kept[r.dst] = true
		}
	}
	// Who reaches a gateway comes before who needs it.
	slices.SortStableFunc(add, func(a, b addition) int { return cmp.Compare(a.rank(), b.rank()) })
	return remove, add
}

func (r route) rank() int {
	switch {
	case !r.gw.IsValid():
		return 0
	case r.dst.Bits() > 0:
		return 1
	}
	return 2
}
