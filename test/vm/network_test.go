package vm

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A wire is a network namespace of the host with the other ends of cards in it.
type wire struct {
	taps []*os.File
	echo net.Listener   // TCP: says "tcp" and closes
	dns  net.PacketConn // knows no name
}

// newWire makes it: tap0 with 10.99.0.1/24 and fd99::1/64, tap1 with
// 10.98.0.1/24, and 192.168.77.1 behind the first.
func newWire(t *testing.T) *wire {
	t.Helper()
	w := &wire{}
	if err := thread.Run(func() error { return w.make(t) }); err != nil { // the namespace is the thread's
		t.Fatal(err)
	}
	var servers sync.WaitGroup
	servers.Go(func() {
		for {
			conn, err := w.echo.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "tcp\n")
			conn.Close()
		}
	})
	servers.Go(func() {
		buf := make([]byte, 100)
		for {
			n, from, err := w.dns.ReadFrom(buf)
			if err != nil {
				return
			}
			if n > 3 {
				buf[2], buf[3] = 0x81, 0x83 // an answer: NXDOMAIN
			}
			_, _ = w.dns.WriteTo(buf[:n], from)
		}
	})
	t.Cleanup(func() {
		w.echo.Close()
		w.dns.Close()
		closeAll(w.taps)
		servers.Wait()
	})
	return w
}

func (w *wire) make(t *testing.T) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	for name, addrs := range map[string][]string{
		"lo": {"192.168.77.1/32"}, "tap0": {"10.99.0.1/24", "fd99::1/64"}, "tap1": {"10.98.0.1/24"},
	} {
		if name != "lo" {
			w.taps = append(w.taps, tap(t, name, 1)...)
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			if addr.IP.To4() == nil {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("%s: %w", a, err)
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	var err error
	if w.echo, err = net.Listen("tcp", ":7001"); err != nil {
		return err
	}
	w.dns, err = net.ListenPacket("udp", ":53")
	return err
}

// tapOf returns the file of the tap by its name.
func (w *wire) tapOf(t *testing.T, name string) []*os.File {
	t.Helper()
	for _, f := range w.taps {
		if f.Name() == name {
			return []*os.File{f}
		}
	}
	t.Fatalf("no %s", name)
	return nil
}

// TestVMNetwork plugs cards into a guest and configures them in the order in
// which hosts do, before there is a sandbox; a container sees and uses them.
func TestVMNetwork(t *testing.T) {
	m := boot(t, func(s *hypervisor.Spec) { s.KernelParams = append(s.KernelParams, "agent.hotplug_timeout=60") })
	w := newWire(t)
	const mac0, mac1 = "02:00:00:00:99:02", "02:00:00:00:98:02"

	// The first is waited for by its MAC, the second is found by its path, and has
	// a MAC that it shall not keep.
	var plugging sync.WaitGroup
	plugging.Go(func() {
		if _, err := m.PlugNIC(m.ctx(), hypervisor.NIC{ID: "n0", MAC: mac0}, w.tapOf(t, "tap0"), nil); err != nil {
			t.Error(err)
		}
	})
	start := time.Now()
	first, err := m.agent.UpdateInterface(m.ctx(), &protocol.UpdateInterfaceRequest{Interface: &types.Interface{
		Name: "net0", HwAddr: mac0, Mtu: 1400,
		IPAddresses: []*types.IPAddress{{Address: "10.99.0.2", Mask: "24"}, {Family: types.IPFamily_v6, Address: "fd99::2", Mask: "64"}},
	}})
	plugging.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("plugged and configured within %v", time.Since(start))
	path, err := m.PlugNIC(m.ctx(), hypervisor.NIC{ID: "n1", MAC: "02:00:00:00:98:77"}, w.tapOf(t, "tap1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	second := &types.Interface{
		Name: "eth0", HwAddr: mac1, DevicePath: path, RawFlags: unix.IFF_NOARP,
		IPAddresses: []*types.IPAddress{{Address: "10.98.0.2", Mask: "24"}},
	}
	for range 2 { // outside, and then inside
		if _, err := m.agent.UpdateInterface(m.ctx(), &protocol.UpdateInterfaceRequest{Interface: second}); err != nil {
			t.Fatal(err)
		}
	}
	routes, err := m.agent.UpdateRoutes(m.ctx(), &protocol.UpdateRoutesRequest{Routes: &protocol.Routes{Routes: []*types.Route{
		{Gateway: "10.99.0.1", Device: "net0"},
		{Gateway: "fd99::1", Device: "net0", Family: types.IPFamily_v6},
		{Dest: "192.168.78.0/24", Device: "eth0", Scope: unix.RT_SCOPE_LINK, Mtu: 1300, Source: "10.98.0.2"},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.agent.AddARPNeighbors(m.ctx(), &protocol.AddARPNeighborsRequest{Neighbors: &protocol.ARPNeighbors{ARPNeighbors: []*types.ARPNeighbor{
		{ToIPAddress: &types.IPAddress{Address: "10.98.0.9"}, Device: "eth0", Lladdr: "02:00:00:00:98:09", State: unix.NUD_PERMANENT},
	}}})
	if err != nil {
		t.Fatal(err)
	}

	m.createSandbox()
	m.create("c", nil, "/bin/sleep", "100000")
	m.startContainer("c")
	has := func(command string, want ...string) {
		t.Helper()
		out := m.inContainer("c", strings.Fields("/bin/busybox "+command)...)
		for _, text := range want {
			if !strings.Contains(out, text) {
				t.Errorf("%s: no %q in\n%s", command, text, out)
			}
		}
	}
	has("ip addr show net0", "mtu 1400", mac0, "UP", "inet 10.99.0.2/24", "inet6 fd99::2/64")
	has("ip addr show eth0", "NOARP", mac1, "UP", "inet 10.98.0.2/24")
	has("ip addr show lo", "UP", "127.0.0.1/8")
	has("ip route", "default via 10.99.0.1 dev net0", "10.99.0.0/24 dev net0 scope link", "192.168.78.0/24 dev eth0 scope link  src 10.98.0.2")
	has("ip -6 route", "default via fd99::1 dev net0", "fd99::/64 dev net0")
	has("ip neigh", "10.98.0.9 dev eth0 lladdr 02:00:00:00:98:09")
	if first.GetName() != "net0" || first.GetMtu() != 1400 || len(routes.GetRoutes()) < 6 {
		t.Errorf("answers %v, %v", first, routes)
	}
	listed, err := m.agent.ListInterfaces(m.ctx(), &protocol.ListInterfacesRequest{})
	if err != nil || len(listed.GetInterfaces()) != 3 {
		t.Errorf("interfaces %v, %v", listed, err)
	}

	const (
		ping4 = "ping -c 1 -W 10 192.168.77.1" // behind the gateway
		ping6 = "ping -c 1 -W 10 fd99::1"
		tcp   = "nc -w 5 10.99.0.1 7001"
	)
	has(ping4, "1 packets received")
	has(ping6, "1 packets received")
	has(tcp, "tcp")
	has("nslookup vmshim.test 10.99.0.1", "NXDOMAIN") // UDP
	stats, err := m.agent.StatsContainer(m.ctx(), &protocol.StatsContainerRequest{ContainerId: "c"})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range stats.GetNetworkStats() {
		if s.GetName() == "net0" && (s.GetRxPackets() < 4 || s.GetTxPackets() < 4 || s.GetRxBytes() < 200 || s.GetTxBytes() < 200) || s.GetName() == "lo" {
			t.Errorf("statistics %v", s)
		}
	}
	if len(stats.GetNetworkStats()) != 2 {
		t.Errorf("statistics %v", stats.GetNetworkStats())
	}
	m.networkRules(has, tcp, ping6)
}

// networkRules loads rules that drop what worked before, and lists them.
func (m *machine) networkRules(has func(command string, want ...string), tcp, ping6 string) {
	t := m.tb
	for _, rules := range []struct {
		v6         bool
		rule       string
		drops      string
		otherwise  string
		goesOn     string
		goesOnWith string
	}{
		{false, "-A OUTPUT -d 10.99.0.1/32 -p tcp -m tcp --dport 7001 -m comment --comment ours -j DROP", tcp, "tcp", ping6, "1 packets received"},
		{true, "-A INPUT -s fd99::1/128 -p ipv6-icmp -m icmp6 --icmpv6-type 129 -j DROP", strings.Replace(ping6, "-W 10", "-W 2", 1), "1 packets received", "true", ""},
	} {
		_, err := m.agent.SetIPTables(m.ctx(), &protocol.SetIPTablesRequest{IsIpv6: rules.v6, Data: []byte("*filter\n" + rules.rule + "\nCOMMIT\n")})
		if err != nil {
			t.Error(err)
			continue
		}
		got, err := m.agent.GetIPTables(m.ctx(), &protocol.GetIPTablesRequest{IsIpv6: rules.v6})
		if err != nil || !strings.Contains(string(got.GetData()), rules.rule+"\n") {
			t.Errorf("rules %s, %v, want %s", got.GetData(), err, rules.rule)
		}
		if out, _ := m.exec("c", fmt.Sprint("dropped", rules.v6), nil, strings.Fields("/bin/busybox "+rules.drops)...); strings.Contains(out, rules.otherwise) {
			t.Errorf("%s in spite of the rule: %s", rules.drops, out)
		}
		has(rules.goesOn, rules.goesOnWith)
	}
	_, err := m.agent.SetIPTables(m.ctx(), &protocol.SetIPTablesRequest{Data: []byte("*filter\n-A NOWHERE -j DROP\nCOMMIT\n")})
	if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a rule for no chain: %v", err)
	} else {
		t.Log(err)
	}
	if _, err := m.agent.SetIPTables(m.ctx(), &protocol.SetIPTablesRequest{Data: []byte("*filter\n:OUTPUT ACCEPT\nCOMMIT\n")}); err != nil {
		t.Error(err)
	}
	has(tcp, "tcp")
}
