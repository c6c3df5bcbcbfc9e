package network

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

func addr(s string) Address           { return Address{Prefix: netip.MustParsePrefix(s)} }
func dst(s string) netip.Prefix       { return netip.MustParsePrefix(s) }
func ip(s string) netip.Addr          { return netip.MustParseAddr(s) }
func v4(a, m string) *types.IPAddress { return &types.IPAddress{Address: a, Mask: m} }
func v6(a, m string) *types.IPAddress {
	return &types.IPAddress{Family: types.IPFamily_v6, Address: a, Mask: m}
}

func TestNewPlan(t *testing.T) {
	const mac, mac2 = "02:00:00:00:00:02", "02:00:00:00:00:03"
	lo := Link{Index: 1, Name: "lo", Kind: "device", MTU: 65536, Up: true}
	eth0 := Link{Index: 5, Name: "eth0", Kind: "veth", MAC: mac, MTU: 1400, Ether: true, Up: true}
	for name, tt := range map[string]struct {
		in   Snapshot
		want Plan
	}{
		"empty": {in: Snapshot{Links: []Link{lo}}},
		"bridge plugin": {
			in: Snapshot{
				Links: []Link{lo, with(eth0, addr("10.1.0.2/24"), addr("fd00::2/64"), addr("fe80::ff:fe00:2/64"))},
				Routes: []Route{
					{Dst: dst("0.0.0.0/0"), Gateway: ip("10.1.0.1"), Link: 5, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT},
					{Dst: dst("10.1.0.0/24"), Link: 5, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_KERNEL, Scope: unix.RT_SCOPE_LINK, Source: ip("10.1.0.2")},
					{Dst: dst("10.1.0.2/32"), Link: 5, Table: unix.RT_TABLE_LOCAL, Protocol: unix.RTPROT_KERNEL},
					{Dst: dst("127.0.0.0/8"), Link: 1, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT},
					{Dst: dst("::/0"), Gateway: ip("fd00::1"), Link: 5, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT},
				},
			},
			want: Plan{
				Endpoints: []Endpoint{{LinkID{5, "eth0"}, mac, 1400, &types.Interface{
					Device: "eth0", Name: "eth0", HwAddr: mac, Mtu: 1400, IPAddresses: []*types.IPAddress{v4("10.1.0.2", "24"), v6("fd00::2", "64")},
				}}},
				Routes: []*types.Route{
					{Gateway: "10.1.0.1", Device: "eth0"},
					{Gateway: "fd00::1", Device: "eth0", Family: types.IPFamily_v6},
				},
			},
		},
		"ptp plugin, calico": { // a host route to a gateway outside, and how to reach it
			in: Snapshot{
				Links: []Link{with(eth0, addr("10.1.0.2/32"))},
				Routes: []Route{
					{Dst: dst("169.254.1.1/32"), Link: 5, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT, Scope: unix.RT_SCOPE_LINK},
					{Dst: dst("0.0.0.0/0"), Gateway: ip("169.254.1.1"), Link: 5, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT, OnLink: true, MTU: 1300, Source: ip("10.1.0.2")},
				},
				Neighbors: []Neighbor{{ip("169.254.1.1"), 5, "ee:ee:ee:ee:ee:ee"}, {ip("10.9.9.9"), 1, mac}},
			},
			want: Plan{
				Endpoints: []Endpoint{{LinkID{5, "eth0"}, mac, 1400, &types.Interface{
					Device: "eth0", Name: "eth0", HwAddr: mac, Mtu: 1400, IPAddresses: []*types.IPAddress{v4("10.1.0.2", "32")},
				}}},
				Routes: []*types.Route{
					{Dest: "169.254.1.1/32", Device: "eth0", Scope: unix.RT_SCOPE_LINK},
					{Gateway: "169.254.1.1", Device: "eth0", Flags: unix.RTNH_F_ONLINK, Mtu: 1300, Source: "10.1.0.2"},
				},
				Neighbors: []*types.ARPNeighbor{{
					ToIPAddress: &types.IPAddress{Address: "169.254.1.1"}, Device: "eth0", Lladdr: "ee:ee:ee:ee:ee:ee", State: unix.NUD_PERMANENT,
				}},
			},
		},
		"addresses that the guest gets by itself": {
			in: Snapshot{Links: []Link{with(eth0, Address{dst("2001:db8::2/64"), true}, Address{dst("10.1.0.2/24"), true}, addr("fe80::1/64"))}},
			want: Plan{Endpoints: []Endpoint{{LinkID{5, "eth0"}, mac, 1400, &types.Interface{
				Device: "eth0", Name: "eth0", HwAddr: mac, Mtu: 1400, IPAddresses: []*types.IPAddress{v4("10.1.0.2", "24"), v6("fe80::1", "64")},
			}}}},
		},
		"kinds": {
			in: Snapshot{Links: []Link{
				{Index: 9, Name: "net1", Kind: "macvlan", MAC: mac2, MTU: 1500, Ether: true, Up: true, NoARP: true},
				eth0,
				{Index: 2, Name: "sit0", Kind: "sit", MTU: 1480},
				{Index: 3, Name: "down", Kind: "veth", MAC: mac, MTU: 1500, Ether: true},
				{Index: 4, Name: "vmshim5", Kind: "tuntap", Alias: "vmshim:sb", MAC: mac, MTU: 1400, Ether: true, Up: true},
				{Index: 6, Name: "tun0", Kind: "tuntap", MTU: 1400, Up: true},
				{Index: 7, Name: "br0", Kind: "bridge", MAC: mac, MTU: 1400, Ether: true, Up: true},
				{Index: 8, Name: "port", Kind: "dummy", MAC: mac, MTU: 1400, Ether: true, Up: true, Master: 7},
			}},
			want: Plan{
				Endpoints: []Endpoint{
					{LinkID{5, "eth0"}, mac, 1400, &types.Interface{Device: "eth0", Name: "eth0", HwAddr: mac, Mtu: 1400}},
					{LinkID{9, "net1"}, mac2, 1500, &types.Interface{Device: "net1", Name: "net1", HwAddr: mac2, Mtu: 1500, RawFlags: unix.IFF_NOARP}},
				},
				LeftOut: []string{
					"interface tun0: a tuntap carries no Ethernet frames",
					"interface br0: a bridge has its traffic inside the host",
					"interface port: is a port of another one",
				},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(&tt.want, NewPlan(&tt.in), protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func with(l Link, addrs ...Address) Link {
	l.Addrs = addrs
	return l
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{{}, {TC, "auto"}, {Macvtap, "on"}, {None, "off"}} {
		if err := c.Validate(); err != nil {
			t.Error(err)
		}
	}
	for _, c := range []Config{{Model: "bridge"}, {Vhost: "yes"}} {
		if c.Validate() == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}
