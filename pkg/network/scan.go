package network

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/rtnetlink"
)

// Scan takes a snapshot.
func (n *Namespace) Scan() (*Snapshot, error) {
	links, err := rtnetlink.Dump(n.handle.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	addrs, err := rtnetlink.Dump(func() ([]netlink.Addr, error) { return n.handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	s := &Snapshot{}
	for _, link := range links {
		s.Links = append(s.Links, toLink(link, addrs))
	}
	if s.Routes, err = n.routes(); err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	if s.Neighbors, err = n.neighbors(); err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	return s, nil
}

func toLink(link netlink.Link, addrs []netlink.Addr) Link {
	a := link.Attrs()
	l := Link{
		Index: a.Index, Name: a.Name, Kind: link.Type(), Alias: a.Alias,
		MAC: a.HardwareAddr.String(), MTU: a.MTU, Master: a.MasterIndex,
		Ether: a.EncapType == "ether", Up: a.Flags&net.FlagUp != 0, NoARP: a.RawFlags&unix.IFF_NOARP != 0,
	}
	for _, addr := range addrs {
		if addr.LinkIndex == a.Index {
			l.Addrs = append(l.Addrs, Address{prefixOf(addr.IPNet), addr.Flags&unix.IFA_F_PERMANENT == 0})
		}
	}
	return l
}

func (n *Namespace) routes() (all []Route, _ error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := rtnetlink.Dump(func() ([]netlink.Route, error) {
			return n.handle.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, err
		}
		for _, raw := range list {
			all = append(all, toRoutes(raw)...)
		}
	}
	return all, nil
}

// toRoutes is one route for each next hop. Routes of other types, and those
// through another family or a tunnel, are not for a machine.
func toRoutes(raw netlink.Route) (all []Route) {
	if raw.Type != unix.RTN_UNICAST {
		return nil
	}
	base := Route{
		Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Source: addrOf(raw.Src), Table: raw.Table,
		Priority: raw.Priority, Protocol: int(raw.Protocol), Scope: int(raw.Scope), MTU: raw.MTU,
	}
	if raw.Family == netlink.FAMILY_V6 {
		base.Dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if raw.Dst != nil {
		base.Dst = prefixOf(raw.Dst)
	}
	hops := raw.MultiPath
	if len(hops) == 0 {
		hops = []*netlink.NexthopInfo{{LinkIndex: raw.LinkIndex, Gw: raw.Gw, Flags: raw.Flags, Via: raw.Via, Encap: raw.Encap}}
	}
	for _, hop := range hops {
		if hop.Via != nil || hop.Encap != nil {
			continue
		}
		r := base
		r.Gateway, r.Link, r.OnLink = addrOf(hop.Gw), hop.LinkIndex, hop.Flags&unix.RTNH_F_ONLINK != 0
		all = append(all, r)
	}
	return all
}

func (n *Namespace) neighbors() (all []Neighbor, _ error) {
	list, err := rtnetlink.Dump(func() ([]netlink.Neigh, error) { return n.handle.NeighList(0, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	for _, raw := range list {
		if ip := addrOf(raw.IP); ip.IsValid() && raw.State&unix.NUD_PERMANENT != 0 && len(raw.HardwareAddr) == 6 {
			all = append(all, Neighbor{ip, raw.LinkIndex, raw.HardwareAddr.String()})
		}
	}
	return all, nil
}

func prefixOf(n *net.IPNet) netip.Prefix {
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addrOf(n.IP), ones)
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
