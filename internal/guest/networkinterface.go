package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/internal/rtnetlink"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

const ifLoopback = net.FlagLoopback

// ListInterfaces implements the protocol.
func (s *service) ListInterfaces(context.Context, *protocol.ListInterfacesRequest) (*protocol.Interfaces, error) {
	list := &protocol.Interfaces{}
	err := s.sandbox.network.look(func(h *netlink.Handle) error {
		links, err := rtnetlink.Dump(h.LinkList)
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, link := range links {
			i, err := describe(h, link)
			if err != nil {
				return err
			}
			list.Interfaces = append(list.Interfaces, i)
		}
		return nil
	})
	return list, err
}

func describe(h *netlink.Handle, link netlink.Link) (*types.Interface, error) {
	addrs, err := addresses(h, link)
	if err != nil {
		return nil, err
	}
	a := link.Attrs()
	i := &types.Interface{
		Device: a.Name, Name: a.Name, Mtu: uint64(a.MTU), HwAddr: a.HardwareAddr.String(),
		Type: link.Type(), RawFlags: a.RawFlags,
	}
	for _, addr := range addrs {
		p := prefixOf(addr.IPNet)
		i.IPAddresses = append(i.IPAddresses, &types.IPAddress{
			Family: familyOf(p.Addr()), Address: p.Addr().String(), Mask: strconv.Itoa(p.Bits()),
		})
	}
	return i, nil
}

func addresses(h *netlink.Handle, link netlink.Link) ([]netlink.Addr, error) {
	addrs, err := rtnetlink.Dump(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	return addrs, nil
}

func prefixOf(n *net.IPNet) netip.Prefix {
	ip, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), ones)
}

func toIPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func familyOf(ip netip.Addr) types.IPFamily {
	if ip.Is6() {
		return types.IPFamily_v6
	}
	return types.IPFamily_v4
}

// UpdateInterface implements the protocol: the interface is found by the PCI
// path of its card, else by MAC, else by name; waited for; moved inside; and made
// what the request says. Of the flags only IFF_NOARP counts.
func (s *service) UpdateInterface(ctx context.Context, req *protocol.UpdateInterfaceRequest) (*types.Interface, error) {
	want, err := parseInterface(req.GetInterface())
	if err != nil {
		return nil, err
	}
	var result *types.Interface
	n := s.sandbox.network
	err = n.alter(ctx, func(in *netlink.Handle) error {
		link, err := n.bring(ctx, in, want)
		if err == nil {
			err = want.apply(in, link)
		}
		if err == nil {
			link, err = in.LinkByIndex(link.Attrs().Index)
		}
		if err == nil {
			result, err = describe(in, link)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("update interface %s: %w", want, err)
	}
	return result, nil
}

// String is how the request names the interface.
func (w *iface) String() string {
	var names []string
	if w.name != "" {
		names = append(names, w.name)
	}
	if w.mac != nil {
		names = append(names, w.mac.String())
	}
	if w.pci != nil {
		names = append(names, "at "+w.pci.String())
	}
	return strings.Join(names, " ")
}

// A candidate is a link, and the handle of the namespace that it is in.
type candidate struct {
	netlink.Link
	h *netlink.Handle
}

// pick chooses the link that is meant. dirOf finds the device of a link in sysfs;
// card is the directory of the one with the wanted path.
func (w *iface) pick(all []candidate, card string, dirOf func(*netlink.LinkAttrs) string) *candidate {
	first := func(is func(*netlink.LinkAttrs) bool) *candidate {
		for i := range all {
			if a := all[i].Attrs(); a.Flags&ifLoopback == 0 && is(a) {
				return &all[i]
			}
		}
		return nil
	}
	if w.pci != nil {
		return first(func(a *netlink.LinkAttrs) bool { return card != "" && strings.HasPrefix(dirOf(a)+"/", card+"/") })
	}
	if w.mac != nil {
		if c := first(func(a *netlink.LinkAttrs) bool { return bytes.Equal(a.HardwareAddr, w.mac) }); c != nil {
			return c
		}
	}
	return first(func(a *netlink.LinkAttrs) bool { return a.Name == w.name })
}

// deviceDir is a link's device in sysfs. The directory of the link itself would
// be seen only from its own namespace.
func (n *network) deviceDir(a *netlink.LinkAttrs) string {
	if a.ParentDev == "" {
		return ""
	}
	dir, err := filepath.EvalSymlinks(filepath.Join(n.devices.sys, "bus", a.ParentDevBus, "devices", a.ParentDev))
	if err != nil {
		return "" // just gone
	}
	return dir
}

// find returns the link, in either namespace, as soon as it is there.
func (n *network) find(ctx context.Context, in, out *netlink.Handle, want *iface) (*candidate, error) {
	wait, cancel := context.WithTimeout(ctx, n.devices.timeout)
	defer cancel()
	events, stop, err := n.outside.linkEvents()
	if err != nil {
		return nil, err
	}
	defer stop()
	for {
		var all []candidate
		for _, h := range []*netlink.Handle{in, out} {
			links, err := rtnetlink.Dump(h.LinkList)
			if err != nil {
				return nil, fmt.Errorf("list links: %w", err)
			}
			for _, link := range links {
				all = append(all, candidate{link, h})
			}
		}
		card := ""
		if want.pci != nil {
			card, _ = n.devices.findPCI(want.pci) // it may come
		}
		if c := want.pick(all, card, n.deviceDir); c != nil {
			return c, nil
		}
		select {
		case _, open := <-events:
			if !open {
				return nil, errors.New("wait for link: events were lost")
			}
		case <-wait.Done():
			if ctx.Err() != nil {
				return nil, fmt.Errorf("wait for link: %w", ctx.Err())
			}
			return nil, notFound("no such link within %v; there are %s", n.devices.timeout, namesOf(all))
		}
	}
}

func namesOf(all []candidate) string {
	names := make([]string, len(all))
	for i, c := range all {
		names[i] = strings.TrimSpace(c.Attrs().Name + " " + c.Attrs().HardwareAddr.String())
	}
	return bound(strings.Join(names, ", "), 512)
}

// bring finds the link and moves it inside if it is not there, under the name
// that it shall have.
func (n *network) bring(ctx context.Context, in *netlink.Handle, want *iface) (netlink.Link, error) {
	out, err := n.outside.netlink()
	if err != nil {
		return nil, err
	}
	defer out.Close()
	link, err := n.find(ctx, in, out, want)
	if err != nil {
		return nil, err
	}
	if link.h == in {
		return link, rename(in, link, want.name)
	}
	name := want.name
	if name == "" {
		name = link.Attrs().Name
		if _, err := in.LinkByName(name); err == nil {
			name = "eth%d" // the first that is free
		}
	}
	if err := n.move(out, link); err != nil {
		return nil, fmt.Errorf("move %s: %w", link.Attrs().Name, err)
	}
	moved, err := in.LinkByName(travelName(link))
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", travelName(link), err)
	}
	return moved, rename(in, moved, name)
}

// travelName is in use on neither side.
func travelName(link netlink.Link) string { return fmt.Sprintf("vmshim%d", link.Attrs().Index) }

func (n *network) move(out *netlink.Handle, link netlink.Link) error {
	ns, err := n.pin()
	if err != nil {
		return err
	}
	if err := out.LinkSetDown(link); err != nil {
		return fmt.Errorf("set down: %w", err)
	}
	if err := out.LinkSetName(link, travelName(link)); err != nil {
		return fmt.Errorf("rename: %w", err)
	}
	var merr error
	if err := ns.control(func(fd int) { merr = out.LinkSetNsFd(link, fd) }); err != nil {
		return err
	}
	return merr
}

// rename names a link. Another one that has the name gets a free one: its own
// request may come later.
func rename(h *netlink.Handle, link netlink.Link, name string) error {
	if name == "" || link.Attrs().Name == name {
		return nil
	}
	other, err := h.LinkByName(name)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
	case err != nil:
		return fmt.Errorf("look for %s: %w", name, err)
	case other.Attrs().Index != link.Attrs().Index:
		if err := setName(h, other, "moved%d"); err != nil {
			return err
		}
		if other.Attrs().Flags&net.FlagUp != 0 {
			if err := h.LinkSetUp(other); err != nil {
				return fmt.Errorf("set %s up: %w", name, err)
			}
		}
	}
	return setName(h, link, name)
}

func setName(h *netlink.Handle, link netlink.Link, name string) error {
	err := whenDown(h, link, func() error { return h.LinkSetName(link, name) })
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", link.Attrs().Name, name, err)
	}
	return nil
}

// whenDown makes a change that some kernels and drivers refuse while a link is
// up. It is down then, and its routes are lost.
func whenDown(h *netlink.Handle, link netlink.Link, change func() error) error {
	err := change()
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	if err := h.LinkSetDown(link); err != nil {
		return fmt.Errorf("set down: %w", err)
	}
	return change()
}

// apply makes the link what is wanted, except for its name. What is so already
// is left alone.
func (w *iface) apply(h *netlink.Handle, link netlink.Link) error {
	a := link.Attrs()
	if w.mac != nil && !bytes.Equal(a.HardwareAddr, w.mac) {
		if err := whenDown(h, link, func() error { return h.LinkSetHardwareAddr(link, w.mac) }); err != nil {
			return fmt.Errorf("set MAC: %w", err)
		}
	}
	if w.mtu != 0 && a.MTU != w.mtu {
		if err := whenDown(h, link, func() error { return h.LinkSetMTU(link, w.mtu) }); err != nil {
			return fmt.Errorf("set mtu %d: %w", w.mtu, err)
		}
	}
	if w.noARP != (a.RawFlags&unix.IFF_NOARP != 0) {
		set := h.LinkSetARPOn
		if w.noARP {
			set = h.LinkSetARPOff
		}
		if err := set(link); err != nil {
			return fmt.Errorf("set arp: %w", err)
		}
	}
	// Before the addresses: routes of a link that is down are refused.
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return w.address(h, link)
}

// address leaves the link the wanted addresses, and the link-local ones that the
// kernel gives it.
func (w *iface) address(h *netlink.Handle, link netlink.Link) error {
	have, err := addresses(h, link)
	if err != nil {
		return err
	}
	for _, addr := range have {
		p := prefixOf(addr.IPNet)
		if slices.Contains(w.addrs, p) || p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
			continue
		}
		// An address takes the secondary ones of its net along.
		if err := h.AddrDel(link, &addr); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", p, err)
		}
	}
	for _, p := range w.addrs {
		addr := &netlink.Addr{IPNet: toIPNet(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // else it could not be used for a second
		}
		if err := h.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
	}
	return nil
}

// AddARPNeighbors implements the protocol, for both families. An entry that is
// there is replaced.
func (s *service) AddARPNeighbors(ctx context.Context, req *protocol.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	entries := req.GetNeighbors().GetARPNeighbors()
	if len(entries) > maxAddress {
		return nil, invalid("%d neighbours", len(entries))
	}
	var list []neighbor
	for _, e := range entries {
		n, err := parseNeighbor(e)
		if err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	return &emptypb.Empty{}, s.sandbox.network.alter(ctx, func(h *netlink.Handle) error {
		index, _, err := linkNames(h)
		if err != nil {
			return err
		}
		for _, n := range list {
			if index[n.device] == 0 {
				return notFound("add neighbour %s: interface %q", n.ip, n.device)
			}
		}
		for i, n := range list {
			err := h.NeighSet(&netlink.Neigh{
				LinkIndex: index[n.device], IP: n.ip.AsSlice(), HardwareAddr: n.mac, State: n.state, Flags: n.flags,
			})
			if err != nil {
				return fmt.Errorf("add neighbour %s of %s (%d of %d): %w", n.ip, n.device, i+1, len(list), err)
			}
		}
		return nil
	})
}

// linkNames are the indices of links by their names, and the names by index.
func linkNames(h *netlink.Handle) (index map[string]int, name map[int]string, err error) {
	links, err := rtnetlink.Dump(h.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list links: %w", err)
	}
	index, name = map[string]int{}, map[int]string{}
	for _, link := range links {
		a := link.Attrs()
		index[a.Name], name[a.Index] = a.Index, a.Name
	}
	return index, name, nil
}
