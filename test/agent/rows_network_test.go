package agent_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

var networkRows = []row{
	{32, "UpdateInterface", "UpdateInterface", "name, MTU, state, flags and addresses of a plugged card in the guest's netlink, found by MAC and by PCI path", proveUpdateInterface, with[noUpdateInterface]},
	{33, "ListInterfaces", "ListInterfaces", "equals the guest's netlink", proveListInterfaces, with[noListInterfaces]},
	{34, "UpdateRoutes", "UpdateRoutes", "routes of both families in the guest's netlink", proveUpdateRoutes, with[noUpdateRoutes]},
	{35, "ListRoutes", "ListRoutes", "equals the guest's netlink, both families", proveListRoutes, with[noListRoutes]},
	{48, "IPTables", "GetIPTables", "rules, v4 and v6, that were loaded in the guest by hand", proveIPTables, with[noIPTables]},
	{49, "SetIPTables", "SetIPTables", "pings, v4 and v6, are dropped; iptables-save in the guest shows the rules", proveSetIPTables, with[noSetIPTables]},
	{54, "AddARPNeighbors", "AddARPNeighbors", "permanent neighbours, v4 and v6, in the guest's netlink", proveAddARPNeighbors, with[noAddARPNeighbors]},
}

// A nic is a card that was plugged.
type nic struct{ mac, path string }

var nics int

// plugNIC plugs a network card, for the time of the proof.
func (e *env) plugNIC() nic {
	nics++
	tap := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("vmrows%d", nics)}, Mode: netlink.TUNTAP_MODE_TAP,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Queues: 1, NonPersist: true,
	}
	e.ok(netlink.LinkAdd(tap))
	defer func() {
		for _, f := range tap.Fds {
			f.Close()
		}
	}()
	g, id := e.guest, fmt.Sprintf("n%d", nics)
	n := nic{mac: fmt.Sprintf("02:00:00:00:01:%02x", nics)}
	path, err := g.PlugNIC(e.ctx, hypervisor.NIC{ID: id, MAC: n.mac}, tap.Fds, nil)
	e.ok(err)
	n.path = path
	e.undo.Add(func() error {
		if g.gone() {
			return nil
		}
		ctx, cancel := e.later()
		defer cancel()
		return g.UnplugNIC(ctx, id)
	})
	return n
}

// wanted is the card with a name and an address.
func (n nic) wanted(name, address, mask string) *types.Interface {
	return &types.Interface{
		HwAddr: n.mac, Device: name, Name: name, Mtu: 1500,
		IPAddresses: []*types.IPAddress{{Family: types.IPFamily_v4, Address: address, Mask: mask}},
	}
}

// card plugs a card and gives it a name and addresses, by the agent that works.
func (e *env) card(name string) nic {
	n := e.plugNIC()
	i := n.wanted(name, "192.0.2.5", "24")
	i.IPAddresses = append(i.IPAddresses, &types.IPAddress{Family: types.IPFamily_v6, Address: "2001:db8::5", Mask: "64"})
	_, err := e.guest.client.UpdateInterface(e.ctx, i)
	e.ok(err)
	return n
}

func neighbor(ip, device, mac string) *types.ARPNeighbor {
	family := types.IPFamily_v4
	if strings.Contains(ip, ":") {
		family = types.IPFamily_v6
	}
	return &types.ARPNeighbor{
		ToIPAddress: &types.IPAddress{Family: family, Address: ip}, Device: device, Lladdr: mac, State: netlink.NUD_PERMANENT,
	}
}

func proveUpdateInterface(e *env) {
	byMAC, byPath := e.plugNIC(), e.plugNIC()
	i := byMAC.wanted("eth7", "192.0.2.5", "24")
	i.Mtu = 1400
	i.IPAddresses = append(i.IPAddresses, &types.IPAddress{Family: types.IPFamily_v6, Address: "2001:db8::5", Mask: "64"})
	_, err := e.UpdateInterface(e.ctx, i)
	e.ok(err)
	j := byPath.wanted("eth8", "198.51.100.5", "25")
	j.DevicePath, j.RawFlags = byPath.path, unix.IFF_NOARP
	_, err = e.UpdateInterface(e.ctx, j)
	e.ok(err)
	link := func(name string) string {
		return e.look("ip -o link show dev " + name + ` | sed -n 's/.*<.*\(\bUP\b\).*mtu \([0-9]*\).*link.ether \([0-9a-f:]*\).*/\1 \2 \3/p'`)
	}
	addresses := func(name string) string {
		return e.look("ip -o addr show dev " + name + ` scope global | awk '{print $4}' | sort | tr '\n' ' '`)
	}
	e.equal("link found by MAC", link("eth7"), "UP 1400 "+byMAC.mac)
	e.equal("its addresses", addresses("eth7"), "192.0.2.5/24 2001:db8::5/64")
	e.equal("link found by PCI path", link("eth8"), "UP 1500 "+byPath.mac)
	e.equal("its addresses", addresses("eth8"), "198.51.100.5/25")
	e.equal("those without ARP", e.look("ip -o link | grep NOARP | awk '{print $2}'"), "eth8:")
	// Again, with another address: it replaces the first.
	i.IPAddresses = []*types.IPAddress{{Family: types.IPFamily_v4, Address: "192.0.2.6", Mask: "24"}}
	_, err = e.UpdateInterface(e.ctx, i)
	e.ok(err)
	e.equal("addresses after a change", addresses("eth7"), "192.0.2.6/24")
}

func proveListInterfaces(e *env) {
	e.card("eth9")
	list, err := e.ListInterfaces(e.ctx)
	e.ok(err)
	var got []string
	for _, i := range list {
		line := fmt.Sprintf("%s mtu %d %s", i.GetName(), i.GetMtu(), i.GetHwAddr())
		got = append(got, strings.TrimSuffix(line, " "))
		for _, a := range i.GetIPAddresses() {
			got = append(got, i.GetName()+" "+a.GetAddress()+"/"+a.GetMask())
		}
	}
	want := strings.Split(e.look(`ip -o link | awk '{sub(":","",$2); sub("@.*","",$2); for(i=1;i<NF;i++){if($i=="mtu")m=$(i+1); if($i ~ /^link.ether/)h=" "$(i+1); if($i=="link/loopback")h=" "$(i+1)}; print $2 " mtu " m h}'; ip -o addr | awk '{print $2 " " $4}'`), "\n")
	for i, w := range want {
		want[i] = strings.TrimSuffix(w, " 00:00:00:00:00:00")
	}
	for i, g := range got {
		got[i] = strings.TrimSuffix(g, " 00:00:00:00:00:00")
	}
	slices.Sort(got)
	slices.Sort(want)
	e.equal("interfaces", got, want)
}

// routes are what the guest's netlink has, as "DEST via GATEWAY dev DEVICE".
func routes(e *env) []string {
	// Those with a type, such as multicast, are of another table.
	return strings.Split(e.look(`{ ip -4 route show; ip -6 route show; } | awk '$1 ~ /^[a-z]+$/ && $1 != "default" {next} {d=$1; g=""; v=""; for(i=2;i<NF;i++){if($i=="via")g=" via " $(i+1); if($i=="dev")v=$(i+1)}; print d g " dev " v}' | sort`), "\n")
}

func proveUpdateRoutes(e *env) {
	e.card("eth0")
	_, err := e.UpdateRoutes(e.ctx, []*types.Route{
		{Dest: "", Gateway: "192.0.2.1", Device: "eth0"},
		{Dest: "198.51.100.0/24", Gateway: "192.0.2.2", Device: "eth0"},
		{Dest: "2001:db8:1::/48", Gateway: "2001:db8::1", Device: "eth0", Family: types.IPFamily_v6},
	})
	e.ok(err)
	got := routes(e)
	for _, want := range []string{
		"default via 192.0.2.1 dev eth0", "198.51.100.0/24 via 192.0.2.2 dev eth0", "2001:db8:1::/48 via 2001:db8::1 dev eth0",
	} {
		if !slices.Contains(got, want) {
			e.fail("routes of the guest %q lack %q", got, want)
		}
	}
}

func proveListRoutes(e *env) {
	e.card("eth0")
	e.look("ip route add default via 192.0.2.1 dev eth0; ip route add 198.51.100.0/24 via 192.0.2.2; ip -6 route add 2001:db8:1::/48 via 2001:db8::1 dev eth0")
	list, err := e.ListRoutes(e.ctx)
	e.ok(err)
	var got []string
	for _, r := range list {
		line := r.GetDest()
		if line == "" {
			line = "default"
		}
		line = strings.TrimSuffix(strings.TrimSuffix(line, "/32"), "/128")
		if g := r.GetGateway(); g != "" {
			line += " via " + g
		}
		got = append(got, line+" dev "+r.GetDevice())
	}
	slices.Sort(got)
	e.equal("routes", got, routes(e))
}

// A family is what differs between v4 and v6.
type family struct {
	v6                         bool
	save, restore, ping, rules string
}

var families = []family{
	{
		false, "iptables-save", "iptables-restore", "ping -c 1 -W 1 127.0.0.1",
		"*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -i lo -p icmp -j DROP\nCOMMIT\n",
	},
	{
		true, "ip6tables-save", "ip6tables-restore", "ping -6 -c 1 -W 1 ::1",
		"*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -i lo -p ipv6-icmp -j DROP\nCOMMIT\n",
	},
}

// rule is the line that matters.
func (f family) rule() string { return strings.Split(f.rules, "\n")[4] }

// flush removes the rules by hand, in the end.
func (e *env) flush(f family) {
	e.undo.Add(e.guestDo("printf '*filter\nCOMMIT\n' | " + f.restore))
}

func proveIPTables(e *env) {
	for _, f := range families {
		e.flush(f)
		e.look("printf '" + strings.ReplaceAll(f.rules, "\n", `\n`) + "' | " + f.restore)
		b, err := e.IPTables(e.ctx, f.v6)
		e.ok(err)
		if !strings.Contains(string(b), f.rule()+"\n") {
			e.fail("%q lacks %q", b, f.rule())
		}
	}
}

func proveSetIPTables(e *env) {
	for _, f := range families {
		e.flush(f)
		e.look(f.ping)
		e.ok(e.SetIPTables(e.ctx, f.v6, []byte(f.rules)))
		e.equal("rules in the guest", e.look(f.save+" | grep ^-A; true"), f.rule())
		o, err := e.guest.ask(e.ctx, f.ping)
		e.ok(err)
		if o.Status == 0 {
			e.fail("%s goes on: %s", f.ping, o.Output)
		}
	}
}

func proveAddARPNeighbors(e *env) {
	e.card("eth0")
	e.ok(e.AddARPNeighbors(e.ctx, []*types.ARPNeighbor{
		neighbor("192.0.2.77", "eth0", "02:00:00:00:00:77"), neighbor("2001:db8::77", "eth0", "02:00:00:00:00:78"),
	}))
	got := e.look(`ip neigh show | awk '$NF=="PERMANENT"{print $1, $5}' | sort`)
	e.equal("permanent neighbours", got, "192.0.2.77 02:00:00:00:00:77\n2001:db8::77 02:00:00:00:00:78")
}

// slots are a PCI path as numbers.
func slots(path string) (list []uint32) {
	for s := range strings.SplitSeq(path, "/") {
		n, _ := strconv.ParseUint(s, 16, 32)
		list = append(list, uint32(n))
	}
	return list
}
