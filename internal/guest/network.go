package guest

import (
	"context"
	"fmt"
	"net"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// The network of the sandbox: everything here acts in its pinned namespace.

const ifLoopback = net.FlagLoopback

// inNetwork calls f with a netlink handle of the sandbox' network namespace.
func (b *sandbox) inNetwork(f func(*netlink.Handle) error) error {
	b.mu.Lock()
	pins := b.pinned
	b.mu.Unlock()
	if pins == nil {
		return precondition("there is no sandbox yet")
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(pins.net.file.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	return f(h)
}

// ListInterfaces implements the protocol.
func (s *service) ListInterfaces(context.Context, *protocol.ListInterfacesRequest) (*protocol.Interfaces, error) {
	list := &protocol.Interfaces{}
	err := s.sandbox.inNetwork(func(h *netlink.Handle) error {
		links, err := h.LinkList()
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, link := range links {
			addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
			if err != nil {
				return fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
			}
			list.Interfaces = append(list.Interfaces, toInterface(link, addrs))
		}
		return nil
	})
	return list, err
}

func toInterface(link netlink.Link, addrs []netlink.Addr) *types.Interface {
	a := link.Attrs()
	iface := &types.Interface{
		Device: a.Name, Name: a.Name, Mtu: uint64(a.MTU), HwAddr: a.HardwareAddr.String(),
		Type: link.Type(), RawFlags: a.RawFlags,
	}
	for _, addr := range addrs {
		ones, _ := addr.Mask.Size()
		iface.IPAddresses = append(iface.IPAddresses, &types.IPAddress{
			Family: familyOf(addr.IP), Address: addr.IP.String(), Mask: strconv.Itoa(ones),
		})
	}
	return iface
}

func familyOf(ip net.IP) types.IPFamily {
	if ip.To4() == nil {
		return types.IPFamily_v6
	}
	return types.IPFamily_v4
}

// ListRoutes implements the protocol: the main tables of both families.
func (s *service) ListRoutes(context.Context, *protocol.ListRoutesRequest) (*protocol.Routes, error) {
	list := &protocol.Routes{}
	err := s.sandbox.inNetwork(func(h *netlink.Handle) error {
		for family, f := range map[int]types.IPFamily{
			netlink.FAMILY_V4: types.IPFamily_v4, netlink.FAMILY_V6: types.IPFamily_v6,
		} {
			routes, err := h.RouteList(nil, family)
			if err != nil {
				return fmt.Errorf("list routes: %w", err)
			}
			for _, r := range routes {
				list.Routes = append(list.Routes, toRoute(h, &r, f))
			}
		}
		return nil
	})
	return list, err
}

func toRoute(h *netlink.Handle, r *netlink.Route, family types.IPFamily) *types.Route {
	route := &types.Route{Scope: uint32(r.Scope), Family: family, Flags: uint32(r.Flags), Mtu: uint32(r.MTU)}
	if r.Dst != nil {
		if ones, _ := r.Dst.Mask.Size(); ones > 0 {
			route.Dest = r.Dst.String()
		}
	}
	if r.Gw != nil {
		route.Gateway = r.Gw.String()
	}
	if r.Src != nil {
		route.Source = r.Src.String()
	}
	if link, err := h.LinkByIndex(r.LinkIndex); err == nil {
		route.Device = link.Attrs().Name
	}
	return route
}

// UpdateInterface implements the protocol.
func (s *service) UpdateInterface(context.Context, *protocol.UpdateInterfaceRequest) (*types.Interface, error) {
	return nil, notImplemented("UpdateInterface")
}

// UpdateRoutes implements the protocol.
func (s *service) UpdateRoutes(context.Context, *protocol.UpdateRoutesRequest) (*protocol.Routes, error) {
	return nil, notImplemented("UpdateRoutes")
}

// AddARPNeighbors implements the protocol.
func (s *service) AddARPNeighbors(context.Context, *protocol.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return nil, notImplemented("AddARPNeighbors")
}

// GetIPTables implements the protocol.
func (s *service) GetIPTables(context.Context, *protocol.GetIPTablesRequest) (*protocol.GetIPTablesResponse, error) {
	return nil, notImplemented("GetIPTables")
}

// SetIPTables implements the protocol.
func (s *service) SetIPTables(context.Context, *protocol.SetIPTablesRequest) (*protocol.SetIPTablesResponse, error) {
	return nil, notImplemented("SetIPTables")
}
