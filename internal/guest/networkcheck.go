package guest

import (
	"net"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// What requests about the network say, checked before anything is changed.

const (
	maxMTU     = 0xffff
	minMTU     = 68   // of IPv4, RFC 791
	minMTUv6   = 1280 // of IPv6, RFC 8200: the kernel turns it off below
	maxAddress = 1024 // addresses, routes or neighbours in one request
)

// An iface is what UpdateInterface wants.
type iface struct {
	pci   pciPath // nil: found by the others
	mac   net.HardwareAddr
	name  string
	mtu   int // 0 stays as it is
	addrs []netip.Prefix
	noARP bool
}

func parseInterface(in *types.Interface) (*iface, error) {
	out := &iface{name: in.GetName(), mtu: int(min(in.GetMtu(), maxMTU+1)), noARP: in.GetRawFlags()&unix.IFF_NOARP != 0}
	if out.name == "" {
		out.name = in.GetDevice()
	}
	var err error
	if out.name != "" {
		if err := checkLinkName(out.name); err != nil {
			return nil, err
		}
	}
	if in.GetHwAddr() != "" {
		if out.mac, err = parseMAC(in.GetHwAddr()); err != nil {
			return nil, err
		}
	}
	if in.GetDevicePath() != "" {
		if out.pci, err = parsePCIPath(in.GetDevicePath()); err != nil {
			return nil, err
		}
	}
	if len(in.GetIPAddresses()) > maxAddress {
		return nil, invalid("%d addresses", len(in.GetIPAddresses()))
	}
	least := minMTU
	for _, a := range in.GetIPAddresses() {
		addr, err := parseAddress(a)
		if err != nil {
			return nil, err
		}
		if addr.Addr().Is6() {
			least = minMTUv6
		}
		out.addrs = append(out.addrs, addr)
	}
	if out.mtu != 0 && (out.mtu < least || out.mtu > maxMTU) {
		return nil, invalid("mtu %d", in.GetMtu())
	}
	if out.name == "" && out.mac == nil && out.pci == nil {
		return nil, invalid("interface has no name, MAC or device path")
	}
	return out, nil
}

// checkLinkName accepts what the kernel does (dev_valid_name), but no pattern,
// and not the loopback device, which is nobody's.
func checkLinkName(name string) error {
	bad := func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("/:%", r) }
	if name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".." || name == "lo" || strings.ContainsFunc(name, bad) {
		return invalid("interface name %q", bound(name, 128))
	}
	return nil
}

// parseMAC accepts what an Ethernet card can have: neither a group's nor zero.
func parseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || mac.String() == "00:00:00:00:00:00" {
		return nil, invalid("MAC %q", bound(s, 128))
	}
	return mac, nil
}

func parseIP(what, s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" || ip.Is4In6() || ip.IsMulticast() || ip.IsUnspecified() {
		return netip.Addr{}, invalid("%s %q", what, bound(s, 128))
	}
	return ip, nil
}

func parseAddress(in *types.IPAddress) (netip.Prefix, error) {
	ip, err := parseIP("address", in.GetAddress())
	if err != nil {
		return netip.Prefix{}, err
	}
	bits, err := strconv.ParseUint(in.GetMask(), 10, 8)
	if err != nil || int(bits) > ip.BitLen() {
		return netip.Prefix{}, invalid("mask %q of address %s", bound(in.GetMask(), 128), ip)
	}
	return netip.PrefixFrom(ip, int(bits)), nil
}

// A neighbor is what AddARPNeighbors wants.
type neighbor struct {
	ip     netip.Addr
	device string
	mac    net.HardwareAddr
	state  int
	flags  int
}

func parseNeighbor(in *types.ARPNeighbor) (n neighbor, err error) {
	n = neighbor{device: in.GetDevice(), state: int(in.GetState()), flags: int(in.GetFlags())}
	if n.ip, err = parseIP("neighbour", in.GetToIPAddress().GetAddress()); err != nil {
		return n, err
	}
	if err := checkLinkName(n.device); err != nil {
		return n, err
	}
	if n.state == 0 {
		n.state = unix.NUD_PERMANENT
	}
	if n.state < 0 || n.state > 0xff || n.flags < 0 || n.flags > 0xff {
		return n, invalid("neighbour %s has state %#x and flags %#x", n.ip, in.GetState(), in.GetFlags())
	}
	if in.GetLladdr() == "" && (n.state == unix.NUD_NOARP || n.flags&unix.NTF_PROXY != 0) {
		return n, nil
	}
	n.mac, err = parseMAC(in.GetLladdr())
	return n, err
}
