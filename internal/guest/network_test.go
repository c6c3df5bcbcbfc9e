package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/internal/rtnetlink"
	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// A testNetwork is a service whose agent seems to live in a network namespace of
// the test.
type testNetwork struct {
	*service
	t       *testing.T
	in, out *netlink.Handle
}

func newTestNetwork(t *testing.T) *testNetwork {
	t.Helper()
	need.Root(t)
	s := &service{sandbox: newSandbox(Config{HotplugTimeout: 5 * time.Second}, nil, nil)}
	n := s.sandbox.network
	var err error
	if n.outside, err = pinNetwork(); err != nil {
		t.Fatal(err)
	}
	open := func(ns *namespace, err error) *netlink.Handle {
		if err != nil {
			t.Fatal(err)
		}
		h, err := ns.netlink()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(h.Close)
		return h
	}
	t.Cleanup(func() {
		if err := errors.Join(n.close(), n.outside.close()); err != nil {
			t.Error(err)
		}
	})
	return &testNetwork{s, t, open(n.pin()), open(n.outside, nil)}
}

// plug makes a card appear outside; its peer, which stays there, is up.
func (n *testNetwork) plug(name, mac string) {
	n.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	attrs.HardwareAddr, _ = net.ParseMAC(mac)
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "peer" + mac[len(mac)-2:]}
	err := n.out.LinkAdd(veth)
	if err == nil {
		var peer netlink.Link
		if peer, err = n.out.LinkByName(veth.PeerName); err == nil {
			err = n.out.LinkSetUp(peer)
		}
	}
	if err != nil {
		n.t.Error(err)
	}
}

func (n *testNetwork) update(i *types.Interface) *types.Interface {
	n.t.Helper()
	got, err := n.UpdateInterface(n.t.Context(), &protocol.UpdateInterfaceRequest{Interface: i})
	if err != nil {
		n.t.Fatal(err)
	}
	return got
}

// addresses are the global ones of a link inside.
func (n *testNetwork) addresses(name string) string {
	n.t.Helper()
	link, err := n.in.LinkByName(name)
	if err != nil {
		n.t.Fatal(err)
	}
	addrs, err := addresses(n.in, link)
	if err != nil {
		n.t.Fatal(err)
	}
	var list []string
	for _, a := range addrs {
		if !a.IP.IsLinkLocalUnicast() {
			if a.Flags&unix.IFA_F_TENTATIVE != 0 {
				n.t.Errorf("%s is tentative", a.IP)
			}
			list = append(list, a.IPNet.String())
		}
	}
	return strings.Join(list, " ")
}

const mac1, mac2 = "02:00:00:00:00:01", "02:00:00:00:00:02"

func ips(list ...string) []*types.IPAddress {
	var out []*types.IPAddress
	for _, s := range list {
		ip, mask, _ := strings.Cut(s, "/")
		out = append(out, &types.IPAddress{Address: ip, Mask: mask})
	}
	return out
}

func TestUpdateInterface(t *testing.T) {
	n := newTestNetwork(t)
	n.plug("card0", mac1)
	got := n.update(&types.Interface{
		Name: "eth0", HwAddr: mac1, Mtu: 1400, IPAddresses: ips("10.0.0.2/24", "10.0.0.3/24", "fd00::2/64"), RawFlags: unix.IFF_NOARP,
	})
	if _, err := n.out.LinkByName("card0"); err == nil {
		t.Error("the card is still outside")
	}
	link, err := n.in.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	a := link.Attrs()
	if a.MTU != 1400 || a.HardwareAddr.String() != mac1 || a.Flags&net.FlagUp == 0 || a.RawFlags&unix.IFF_NOARP == 0 {
		t.Errorf("link %+v", a)
	}
	if got.GetName() != "eth0" || got.GetMtu() != 1400 || got.GetHwAddr() != mac1 || got.GetType() != "veth" || got.GetRawFlags() != a.RawFlags || len(got.GetIPAddresses()) < 3 {
		t.Errorf("answer %v", got)
	}
	if got := n.addresses("eth0"); got != "10.0.0.2/24 10.0.0.3/24 fd00::2/64" {
		t.Errorf("addresses %s", got)
	}
	// Once more, found inside: the primary address goes and takes its routes
	// along, a route of another one stays.
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1, IPAddresses: ips("10.0.0.3/24", "10.1.0.2/16")})
	via := &netlink.Route{LinkIndex: a.Index, Dst: toIPNet(must(parseAddress(ips("10.9.0.0/16")[0]))), Gw: net.ParseIP("10.1.0.1")}
	if err := n.in.RouteAdd(via); err != nil {
		t.Fatal(err)
	}
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1, IPAddresses: ips("10.1.0.2/16", "fd00::2/64", "10.0.0.3/24")})
	if got := n.addresses("eth0"); got != "10.0.0.3/24 10.1.0.2/16 fd00::2/64" {
		t.Errorf("addresses %s", got)
	}
	if list, err := n.in.RouteListFiltered(netlink.FAMILY_V4, via, netlink.RT_FILTER_GW); err != nil || len(list) != 1 {
		t.Errorf("the route is %v, %v", list, err)
	}
	if link, err = n.in.LinkByName("eth0"); err != nil || link.Attrs().RawFlags&unix.IFF_NOARP != 0 || link.Attrs().MTU != 1400 {
		t.Errorf("link %+v, %v", link, err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A card may be plugged while the call waits for it, and its name may be taken.
func TestUpdateInterfaceWaits(t *testing.T) {
	n := newTestNetwork(t)
	n.plug("eth0", mac1)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1, IPAddresses: ips("10.0.0.2/24")})
	var plugging sync.WaitGroup
	plugging.Go(func() {
		time.Sleep(50 * time.Millisecond)
		n.plug("eth0", mac2)
	})
	start := time.Now()
	n.update(&types.Interface{Name: "eth1", HwAddr: mac2, IPAddresses: ips("10.2.0.2/24")})
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("took %v", d)
	}
	plugging.Wait()
	n.names("eth0 "+mac1, "eth1 "+mac2)

	n.sandbox.devices.timeout = 20 * time.Millisecond
	_, err := n.UpdateInterface(t.Context(), &protocol.UpdateInterfaceRequest{Interface: &types.Interface{Name: "eth7", HwAddr: "02:00:00:00:00:07"}})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "eth1 "+mac2) {
		t.Errorf("a card that is not there: %v", err)
	}
	n.sandbox.devices.timeout = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := n.UpdateInterface(ctx, &protocol.UpdateInterfaceRequest{Interface: &types.Interface{DevicePath: "02/05"}}); !errors.Is(err, ctx.Err()) || ctx.Err() == nil {
		t.Errorf("after the deadline: %v", err)
	}
}

// names compares the links inside, by their MACs.
func (n *testNetwork) names(want ...string) {
	n.t.Helper()
	links, err := rtnetlink.Dump(n.in.LinkList)
	if err != nil {
		n.t.Fatal(err)
	}
	var got []string
	for _, l := range links {
		if a := l.Attrs(); a.Name != "lo" {
			got = append(got, a.Name+" "+a.HardwareAddr.String())
			if a.Flags&net.FlagUp == 0 {
				n.t.Errorf("%s is down", a.Name)
			}
		} else if a.Flags&net.FlagUp == 0 {
			n.t.Error("loopback is down")
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		n.t.Errorf("links %q, want %q", got, want)
	}
}

func TestUpdateInterfaceSwapsNames(t *testing.T) {
	n := newTestNetwork(t)
	n.plug("eth0", mac1)
	n.plug("eth1", mac2)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1})
	n.update(&types.Interface{Name: "eth1", HwAddr: mac2})
	n.update(&types.Interface{Name: "eth1", HwAddr: mac1})
	n.names("eth1 "+mac1, "moved0 "+mac2)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac2})
	n.names("eth0 "+mac2, "eth1 "+mac1)
	// Not found by its MAC, then by its name: it gets the MAC.
	n.update(&types.Interface{Name: "eth0", HwAddr: "02:00:00:00:00:09"})
	n.names("eth0 02:00:00:00:00:09", "eth1 "+mac1)
	// Without a name it keeps its own, or gets a free one.
	n.plug("eth0", "02:00:00:00:00:04")
	n.plug("other", "02:00:00:00:00:03")
	n.update(&types.Interface{HwAddr: "02:00:00:00:00:04"})
	n.update(&types.Interface{HwAddr: "02:00:00:00:00:03"})
	n.names("eth0 02:00:00:00:00:09", "eth1 "+mac1, "eth2 02:00:00:00:00:04", "other 02:00:00:00:00:03")
}

func (n *testNetwork) routes(want ...string) {
	n.t.Helper()
	list, err := n.ListRoutes(n.t.Context(), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	var got []string
	for _, r := range list.GetRoutes() {
		if strings.HasPrefix(r.GetDest(), "fe80:") {
			continue
		}
		text := fmt.Sprintf("%s via %s dev %s src %s scope %d mtu %d onlink %v", r.GetDest(), r.GetGateway(), r.GetDevice(), r.GetSource(), r.GetScope(), r.GetMtu(), r.GetFlags()&unix.RTNH_F_ONLINK != 0)
		for _, nothing := range []string{" via  ", " src  ", " scope 0", " mtu 0", " onlink false"} {
			text = strings.Replace(text, nothing, strings.Repeat(" ", strings.Count(nothing[len(nothing)-1:], " ")), 1)
		}
		got = append(got, text)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		n.t.Errorf("routes\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestUpdateRoutes(t *testing.T) {
	n := newTestNetwork(t)
	n.plug("eth0", mac1)
	n.plug("eth1", mac2)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1, IPAddresses: ips("10.0.0.2/24", "fd00::2/64")})
	n.update(&types.Interface{Name: "eth1", HwAddr: mac2, IPAddresses: ips("10.1.0.2/24")})
	kernel := []string{
		"10.0.0.0/24 dev eth0 src 10.0.0.2 scope 253", "10.1.0.0/24 dev eth1 src 10.1.0.2 scope 253", "fd00::/64 dev eth0",
	}
	n.routes(kernel...)
	set := func(list ...*types.Route) error {
		_, err := n.UpdateRoutes(t.Context(), &protocol.UpdateRoutesRequest{Routes: &protocol.Routes{Routes: list}})
		return err
	}
	// The gateway of the default route is reached by another one in the list.
	list := []*types.Route{
		{Gateway: "169.254.1.1", Device: "eth0"},
		{Gateway: "10.1.0.1", Device: "eth1"},
		{Gateway: "fe80::1", Device: "eth0", Family: types.IPFamily_v6},
		{Gateway: "fd00::1", Device: "eth0", Family: types.IPFamily_v6}, // the kernel makes one of them, with two hops
		{Dest: "10.7.0.0/16", Gateway: "192.168.0.1", Device: "eth1", Flags: unix.RTNH_F_ONLINK, Mtu: 1300, Source: "10.1.0.2"},
		{Dest: "fd07::/16", Gateway: "fd00::9", Device: "eth0", Family: types.IPFamily_v6, Mtu: 1300},
		{Dest: "169.254.1.1/32", Device: "eth0", Scope: unix.RT_SCOPE_LINK},
		{Dest: "10.0.0.0/24", Device: "eth0", Source: "10.0.0.2", Scope: unix.RT_SCOPE_LINK}, // the kernel's
	}
	want := append([]string{
		" via 169.254.1.1 dev eth0", " via 10.1.0.1 dev eth1", " via fe80::1 dev eth0", " via fd00::1 dev eth0",
		"10.7.0.0/16 via 192.168.0.1 dev eth1 src 10.1.0.2 mtu 1300 onlink true",
		"fd07::/16 via fd00::9 dev eth0 mtu 1300", "169.254.1.1/32 dev eth0 scope 253",
	}, kernel...)
	if err := set(list...); err != nil {
		t.Fatal(err)
	}
	n.routes(want...)
	// Then there is nothing to do.
	var again []route
	for _, r := range list {
		again = append(again, must(parseRoute(r)).plain())
	}
	if remove, add := planRoutes(again, must(table(n.in))); len(remove)+len(add) > 0 {
		t.Errorf("once more: remove %v, add %v", remove, add)
	}
	// The table as it is listed can be set.
	all, err := n.ListRoutes(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := set(all.GetRoutes()...); err != nil {
		t.Fatal(err)
	}
	n.routes(want...)
	// An error names the route, and how far it came.
	err = set(&types.Route{Dest: "10.8.0.0/16", Device: "eth0"}, &types.Route{Dest: "10.9.0.0/16", Gateway: "172.16.0.1", Device: "eth0"})
	if err == nil || !strings.Contains(err.Error(), "10.9.0.0/16 via 172.16.0.1 dev eth0 (change 8 of 8)") {
		t.Errorf("a gateway that nobody reaches: %v", err)
	}
	n.routes(append([]string{"10.8.0.0/16 dev eth0 scope 253"}, kernel...)...)
	// Nothing is changed for a request that is wrong.
	for _, wrong := range []*types.Route{{Dest: "10.9.0.1/16", Device: "eth0"}, {Dest: "10.9.0.0/16", Device: "eth9"}} {
		if err := set(wrong); !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
			t.Errorf("%v: %v", wrong, err)
		}
	}
	n.routes(append([]string{"10.8.0.0/16 dev eth0 scope 253"}, kernel...)...)
	if err := set(); err != nil {
		t.Error(err)
	}
	n.routes(kernel...)
}

func TestAddARPNeighbors(t *testing.T) {
	n := newTestNetwork(t)
	n.plug("eth0", mac1)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1, IPAddresses: ips("10.0.0.2/24", "fd00::2/64")})
	add := func(list ...*types.ARPNeighbor) error {
		_, err := n.AddARPNeighbors(t.Context(), &protocol.AddARPNeighborsRequest{Neighbors: &protocol.ARPNeighbors{ARPNeighbors: list}})
		return err
	}
	to := func(ip string) *types.IPAddress { return &types.IPAddress{Address: ip} }
	for range 2 {
		if err := add(
			&types.ARPNeighbor{ToIPAddress: to("10.0.0.1"), Device: "eth0", Lladdr: mac2},
			&types.ARPNeighbor{ToIPAddress: to("fd00::1"), Device: "eth0", Lladdr: mac2, State: unix.NUD_REACHABLE},
		); err != nil {
			t.Fatal(err)
		}
	}
	if err := add(&types.ARPNeighbor{ToIPAddress: to("10.0.0.9"), Device: "eth9", Lladdr: mac2}); !errdefs.IsNotFound(err) {
		t.Errorf("no such device: %v", err)
	}
	all, err := n.in.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, e := range all {
		if e.HardwareAddr.String() == mac2 {
			got[e.IP.String()] = e.State
		}
	}
	if len(got) != 2 || got["10.0.0.1"] != unix.NUD_PERMANENT || got["fd00::1"] != unix.NUD_REACHABLE {
		t.Errorf("neighbours %v", got)
	}
}

// Statistics are those of every interface but the loopback.
func TestNetworkStats(t *testing.T) {
	n := newTestNetwork(t)
	n.plug("eth0", mac1)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1, IPAddresses: ips("10.0.0.2/24")})
	if err := thread.Run(func() error {
		ns, err := n.sandbox.network.pin()
		if err == nil {
			err = ns.enter()
		}
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1); err != nil {
			return err
		}
		return unix.Sendto(fd, make([]byte, 1000), 0, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 0, 0, 255}})
	}); err != nil {
		t.Fatal(err)
	}
	stats, err := n.sandbox.network.stats()
	if err != nil || len(stats) != 1 || stats[0].GetName() != "eth0" || stats[0].GetTxBytes() < 1000 || stats[0].GetTxPackets() == 0 {
		t.Errorf("got %v, %v", stats, err)
	}
}

// The network is the same before and after the sandbox is created, and gone in
// the end.
func TestNetworkLife(t *testing.T) {
	n := newTestNetwork(t)
	var first *namespace
	var calls sync.WaitGroup
	seen := make(chan *namespace, 8)
	for range cap(seen) {
		calls.Go(func() { seen <- must(n.sandbox.network.pin()) })
	}
	calls.Wait()
	for range cap(seen) {
		if ns := <-seen; first == nil {
			first = ns
		} else if ns != first {
			t.Error("another network")
		}
	}
	n.plug("eth0", mac1)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1})
	n.in.Close() // its socket holds the network
	events, stop, err := n.sandbox.network.outside.linkEvents()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	if _, err := n.DestroySandbox(t.Context(), nil); err != nil {
		t.Error(err)
	}
	for timeout := time.After(20 * time.Second); ; {
		if _, err := n.out.LinkByName("peer01"); err != nil {
			break // with the card that went with the network
		}
		select {
		case <-events:
		case <-timeout:
			t.Fatal("the network is still there")
		}
	}
	if _, err := n.ListInterfaces(t.Context(), nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after the end: %v", err)
	}
}

// Programs run in the sandbox' network, are bounded, and end with the call.
func TestIPTables(t *testing.T) {
	n := newTestNetwork(t)
	n.plug("eth0", mac1)
	n.update(&types.Interface{Name: "eth0", HwAddr: mac1})
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	program := func(name, script string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	get := func(v6 bool) (string, error) {
		resp, err := n.GetIPTables(t.Context(), &protocol.GetIPTablesRequest{IsIpv6: v6})
		return string(resp.GetData()), err
	}
	program("ip6tables-save", "cat /proc/thread-self/net/dev")
	if out, err := get(true); err != nil || !strings.Contains(out, "eth0") || strings.Contains(out, "peer") {
		t.Errorf("got %q, %v", out, err)
	}
	program("iptables-save", "exec yes")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := n.GetIPTables(ctx, &protocol.GetIPTablesRequest{}); ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
		t.Errorf("endless: %v", err)
	}
	program("iptables-save", "head -c 5000000 /dev/zero")
	if out, err := get(false); !errdefs.IsResourceExhausted(err) {
		t.Errorf("got %d bytes, %v", len(out), err)
	}
	program("iptables-restore", `echo "$@"; cat; echo line 2 failed >&2; exit ${#1}`)
	set := func(data string) error {
		_, err := n.SetIPTables(t.Context(), &protocol.SetIPTablesRequest{Data: []byte(data)})
		return err
	}
	if err := set("*filter"); err == nil || !strings.Contains(err.Error(), "line 2 failed") || errdefs.IsInvalidArgument(err) {
		t.Errorf("status 6: %v", err)
	}
	program("iptables-restore", "echo line 2 failed >&2; exit 2")
	if err := set("*filter"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "line 2 failed") {
		t.Errorf("status 2: %v", err)
	}
	program("iptables-restore", `test "$1" = --wait && test "$(cat)" = "*filter"`)
	if err := set("*filter"); err != nil {
		t.Error(err)
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := get(false); !errdefs.IsNotImplemented(err) {
		t.Errorf("not there: %v", err)
	}
}
