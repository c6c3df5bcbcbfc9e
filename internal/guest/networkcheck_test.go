package guest

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

func addressOf(ip, mask string) []*types.IPAddress {
	return []*types.IPAddress{{Address: ip, Mask: mask}}
}

func TestParseInterfaceRefuses(t *testing.T) {
	for name, in := range map[string]*types.Interface{
		"nothing":           {},
		"long name":         {Name: "abcdefghijklmnop"},
		"pattern":           {Name: "eth%d"},
		"slash":             {Name: "a/b"},
		"space":             {Name: "a b"},
		"dots":              {Name: ".."},
		"loopback":          {Name: "lo"},
		"no MAC":            {Name: "e", HwAddr: "02:00"},
		"zero MAC":          {Name: "e", HwAddr: "00:00:00:00:00:00"},
		"group's MAC":       {Name: "e", HwAddr: "03:00:00:00:00:01"},
		"long MAC":          {Name: "e", HwAddr: "02:00:00:00:00:00:00:01"},
		"small mtu":         {Name: "e", Mtu: 67},
		"large mtu":         {Name: "e", Mtu: 1 << 33},
		"mtu too small":     {Name: "e", Mtu: 1279, IPAddresses: addressOf("fd00::1", "64")},
		"no address":        {Name: "e", IPAddresses: addressOf("10.0.0", "8")},
		"zone":              {Name: "e", IPAddresses: addressOf("fe80::1%eth0", "64")},
		"mapped":            {Name: "e", IPAddresses: addressOf("::ffff:10.0.0.1", "104")},
		"multicast":         {Name: "e", IPAddresses: addressOf("224.0.0.1", "8")},
		"unspecified":       {Name: "e", IPAddresses: addressOf("0.0.0.0", "8")},
		"long mask":         {Name: "e", IPAddresses: addressOf("10.0.0.1", "33")},
		"dotted mask":       {Name: "e", IPAddresses: addressOf("10.0.0.1", "255.0.0.0")},
		"no mask":           {Name: "e", IPAddresses: addressOf("10.0.0.1", "")},
		"negative mask":     {Name: "e", IPAddresses: addressOf("10.0.0.1", "-1")},
		"path":              {Name: "e", DevicePath: "2/5"},
		"path with a way":   {Name: "e", DevicePath: "02/../05"},
		"path's function":   {Name: "e", DevicePath: "02/05.9"},
		"path of addresses": {Name: "e", DevicePath: "0000:00:02.0"},
	} {
		if w, err := parseInterface(in); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %+v, %v", name, w, err)
		}
	}
}

func TestParseInterface(t *testing.T) {
	w, err := parseInterface(&types.Interface{
		Device: "tap0", HwAddr: "02:00:00:00:00:0A", Mtu: 1400, DevicePath: "02/05", RawFlags: unix.IFF_NOARP | unix.IFF_UP,
		IPAddresses: append(addressOf("10.0.0.1", "8"), addressOf("fd00::1", "64")...),
	})
	if err != nil || w.name != "tap0" || w.mac.String() != "02:00:00:00:00:0a" || w.mtu != 1400 || !w.noARP ||
		w.pci.String() != "02/05" ||
		!slices.Equal(w.addrs, []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8"), netip.MustParsePrefix("fd00::1/64")}) {
		t.Errorf("got %+v, %v", w, err)
	}
}

// A card is found by its path, else by its MAC wherever it is, else by its name.
func TestPick(t *testing.T) {
	link := func(name, mac, parent string) candidate {
		a := netlink.NewLinkAttrs()
		a.Name, a.ParentDev = name, parent
		if mac != "" {
			a.HardwareAddr, _ = parseMAC(mac)
		}
		return candidate{Link: &netlink.Dummy{LinkAttrs: a}}
	}
	lo := link("lo", "", "")
	lo.Attrs().Flags = ifLoopback
	all := []candidate{lo, link("eth0", "02:00:00:00:00:01", ""), link("eth1", "02:00:00:00:00:02", "virtio2"), link("eth2", "02:00:00:00:00:03", "virtio3")}
	dirs := map[string]string{
		"virtio2": "/sys/devices/pci0000:00/0000:00:02.0/0000:01:04.0/virtio2",
		"virtio3": "/sys/devices/pci0000:00/0000:00:02.0/0000:01:05.0/virtio3",
	}
	for _, test := range []struct {
		in         *types.Interface
		card, want string
	}{
		{&types.Interface{Name: "eth1", HwAddr: "02:00:00:00:00:01", DevicePath: "02/05"}, "/sys/devices/pci0000:00/0000:00:02.0/0000:01:05.0", "eth2"},
		{&types.Interface{Name: "eth1", HwAddr: "02:00:00:00:00:01", DevicePath: "02/05"}, "/sys/devices/pci0000:00/0000:00:02.0/0000:01:05", ""},
		{&types.Interface{Name: "eth1", HwAddr: "02:00:00:00:00:01", DevicePath: "02/06"}, "", ""},
		{&types.Interface{Name: "eth1", HwAddr: "02:00:00:00:00:01"}, "", "eth0"},
		{&types.Interface{Name: "eth1", HwAddr: "02:00:00:00:00:09"}, "", "eth1"},
		{&types.Interface{Name: "eth9", HwAddr: "02:00:00:00:00:09"}, "", ""},
	} {
		w, err := parseInterface(test.in)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if c := w.pick(all, test.card, func(a *netlink.LinkAttrs) string { return dirs[a.ParentDev] }); c != nil {
			got = c.Attrs().Name
		}
		if got != test.want {
			t.Errorf("%v: got %q, want %q", test.in, got, test.want)
		}
	}
}

func TestParseRoute(t *testing.T) {
	for _, test := range []struct {
		in   *types.Route
		want string
	}{
		{&types.Route{Device: "e"}, "0.0.0.0/0 dev e"},
		{&types.Route{Device: "e", Family: types.IPFamily_v6}, "::/0 dev e"},
		{&types.Route{Device: "e", Gateway: "fd00::1"}, "::/0 via fd00::1 dev e"},
		{&types.Route{Device: "e", Dest: "10.0.0.1"}, "10.0.0.1/32 dev e"},
		{&types.Route{Dest: "10.0.0.0/8", Gateway: "10.1.1.1"}, "10.0.0.0/8 via 10.1.1.1"},
		{&types.Route{Dest: "0.0.0.0/0", Gateway: "10.1.1.1"}, "0.0.0.0/0 via 10.1.1.1"},
		{&types.Route{Dest: "10.0.0.1/8", Device: "e"}, ""},
		{&types.Route{Dest: "10.0.0.0/33", Device: "e"}, ""},
		{&types.Route{Dest: "fd00::/8", Gateway: "10.0.0.1", Device: "e"}, ""},
		{&types.Route{Dest: "fd00::/8", Source: "10.0.0.1", Device: "e"}, ""},
		{&types.Route{Dest: "10.0.0.0/8"}, ""},
		{&types.Route{Dest: "10.0.0.0/8", Device: "a/b"}, ""},
		{&types.Route{Dest: "10.0.0.0/8", Device: "e", Gateway: "x"}, ""},
		{&types.Route{Dest: "10.0.0.0/8", Device: "e", Source: "x"}, ""},
		{&types.Route{Dest: "10.0.0.0/8", Device: "e", Scope: 256}, ""},
		{&types.Route{Dest: "10.0.0.0/8", Device: "e", Mtu: 1 << 16}, ""},
	} {
		r, err := parseRoute(test.in)
		if test.want == "" && !errors.Is(err, errdefs.ErrInvalidArgument) || test.want != "" && (err != nil || r.String() != test.want) {
			t.Errorf("%v: got %s, %v, want %q", test.in, r, err, test.want)
		}
	}
}

func TestPlanRoutes(t *testing.T) {
	kernel := func(r route) route { r.protocol = unix.RTPROT_KERNEL; return r }
	parse := func(dst, gw, dev string) route {
		r, err := parseRoute(&types.Route{Dest: dst, Gateway: gw, Device: dev})
		if err != nil {
			t.Fatal(err)
		}
		return r.plain()
	}
	net10, net11 := parse("10.0.0.0/8", "", "a"), parse("11.0.0.0/8", "", "a")
	default1, default2 := parse("", "10.0.0.1", "a"), parse("", "10.0.0.2", "a")
	via := parse("12.0.0.0/8", "10.0.0.1", "a")
	for _, test := range []struct {
		name        string
		want, have  []route
		remove, add string
	}{
		{name: "nothing"},
		{name: "order", want: []route{default1, via, net10}, add: "10.0.0.0/8 dev a!, 12.0.0.0/8 via 10.0.0.1 dev a!, 0.0.0.0/0 via 10.0.0.1 dev a!"},
		{name: "is so", want: []route{default1, net10}, have: []route{net10, default1}},
		{name: "others go", want: []route{net10}, have: []route{net10, net11, default1}, remove: "11.0.0.0/8 dev a, 0.0.0.0/0 via 10.0.0.1 dev a"},
		{name: "the kernel's stay", have: []route{kernel(net10)}},
		{name: "the kernel's are enough", want: []route{net10}, have: []route{kernel(net10)}},
		{name: "two", want: []route{default1, default2}, have: []route{default1}, remove: "0.0.0.0/0 via 10.0.0.1 dev a", add: "0.0.0.0/0 via 10.0.0.1 dev a!, 0.0.0.0/0 via 10.0.0.2 dev a"},
		{name: "other order", want: []route{default1, default2}, have: []route{default2, default1}, remove: "0.0.0.0/0 via 10.0.0.2 dev a, 0.0.0.0/0 via 10.0.0.1 dev a", add: "0.0.0.0/0 via 10.0.0.1 dev a!, 0.0.0.0/0 via 10.0.0.2 dev a"},
		{name: "beside the kernel's", want: []route{net10, parse("10.0.0.0/8", "", "b")}, have: []route{kernel(net10)}, add: "10.0.0.0/8 dev b"},
	} {
		var have []tableEntry
		for _, r := range test.have {
			have = append(have, tableEntry{routes: []route{r}})
		}
		remove, add := planRoutes(test.want, have)
		var removed, added []string
		for _, e := range remove {
			removed = append(removed, e.routes[0].String())
		}
		for _, a := range add {
			text := a.String()
			if a.first {
				text += "!"
			}
			added = append(added, text)
		}
		if got := strings.Join(removed, ", "); got != test.remove {
			t.Errorf("%s: remove %s", test.name, got)
		}
		if got := strings.Join(added, ", "); got != test.add {
			t.Errorf("%s: add %s", test.name, got)
		}
	}
}

func TestParseNeighbor(t *testing.T) {
	to := func(ip string) *types.IPAddress { return &types.IPAddress{Address: ip} }
	n, err := parseNeighbor(&types.ARPNeighbor{ToIPAddress: to("fd00::1"), Device: "e", Lladdr: "02:00:00:00:00:01"})
	if err != nil || n.state != unix.NUD_PERMANENT || n.ip.String() != "fd00::1" || n.mac == nil {
		t.Errorf("got %+v, %v", n, err)
	}
	for name, in := range map[string]*types.ARPNeighbor{
		"no address": {Device: "e", Lladdr: "02:00:00:00:00:01"},
		"no device":  {ToIPAddress: to("10.0.0.1"), Lladdr: "02:00:00:00:00:01"},
		"no MAC":     {ToIPAddress: to("10.0.0.1"), Device: "e"},
		"state":      {ToIPAddress: to("10.0.0.1"), Device: "e", Lladdr: "02:00:00:00:00:01", State: -1},
		"flags":      {ToIPAddress: to("10.0.0.1"), Device: "e", Lladdr: "02:00:00:00:00:01", Flags: 256},
	} {
		if n, err := parseNeighbor(in); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %+v, %v", name, n, err)
		}
	}
}

// What is accepted is what the kernel can take, and a route survives the way
// there and back.
func FuzzNetworkRequests(f *testing.F) {
	f.Add("10.0.0.0/8", "10.0.0.1", "eth0", "02/05", "02:00:00:00:00:01", "24")
	f.Add("fd00::/64", "fe80::1", "lo", "1e.1", "ff:ff:ff:ff:ff:ff", "129")
	f.Add("default", "::ffff:1.2.3.4", "eth%d", "../..", "", "")
	f.Fuzz(func(t *testing.T, dst, ip, name, path, mac, mask string) {
		w, err := parseInterface(&types.Interface{Name: name, DevicePath: path, HwAddr: mac, IPAddresses: addressOf(ip, mask)})
		if err == nil {
			if len(w.name) > 15 || strings.ContainsAny(w.name, "/%: \x00") || len(w.mac) != 0 && len(w.mac) != 6 {
				t.Errorf("accepted %+v", w)
			}
			if n := toIPNet(w.addrs[0]); prefixOf(n) != w.addrs[0] {
				t.Errorf("%v became %v", w.addrs[0], n)
			}
		}
		r, err := parseRoute(&types.Route{Dest: dst, Gateway: ip, Device: name})
		if err != nil {
			return
		}
		again, err := parseRoute(toRoute(r))
		if err != nil || again != r {
			t.Errorf("%s came back as %s, %v", r, again, err)
		}
	})
}
