package shim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
)

// TestShimNetwork has a pod on a bridge: what the guest has is what the
// namespace has, and every byte gets through, both ways.
func TestShimNetwork(t *testing.T) {
	h := newHost(t)
	l := h.lan()
	p := l.pod("a", 2)
	p.route(h, "eth0", "192.168.9.0/24", "10.77.0.9")
	c := h.bundle("net", "sleep", "1000").joins(p)
	h.must(writePayload(filepath.Join(c.bundle, "rootfs", "payload")))
	c.run()

	c.has("ip addr show eth0", "mtu 1380", podMAC(2), "UP", "inet 10.77.0.2/24", "inet6 fd77::2/64", "inet6 fe80::ff:fe00:7702/64")
	c.has("ip addr show lo", "UP", "127.0.0.1/8", "::1/128")
	c.has("ip route", "default via 10.77.0.1 dev eth0", "10.77.0.0/24 dev eth0 scope link  src 10.77.0.2", "192.168.9.0/24 via 10.77.0.9 dev eth0")
	c.has("ip -6 route", "default via fd77::1 dev eth0", "fd77::/64 dev eth0")
	c.has("ping -c 3 -W 10 10.77.0.1", "3 packets received")
	c.has("ping -c 3 -W 10 fd77::1", "3 packets received")
	c.has("ping -c 1 -W 10 -s 1352 10.77.0.1", "1 packets received") // as large as the MTU
	sum := payloadSum()
	c.has("nc 10.77.0.1 7001 | sha256sum", sum)
	c.has("nc fd77::1 7002 </payload", sum)

	c.end()
	p.clean(h)
	h.sink.wantNoMore(t)
}

// Two machines on a bridge reach each other; the end of one harms nobody.
func TestShimNetworkPods(t *testing.T) {
	h := newHost(t)
	l := h.lan()
	p, q := l.pod("a", 2), l.pod("b", 3)
	a := h.bundle("a", "sh", "-c", "while :; do echo hello | nc -l -p 7000; done").joins(p).run()
	b := h.bundle("b", "sleep", "1000").joins(q).run()
	b.has("ping -c 2 -W 10 10.77.0.2", "2 packets received")
	b.has("ping -c 2 -W 10 fd77::2", "2 packets received")
	b.has("nc -w 10 10.77.0.2 7000 </dev/null", "hello")
	b.has("nc -w 10 fd77::2 7000 </dev/null", "hello")
	a.end()
	p.clean(h)
	b.has("ping -c 2 -W 10 10.77.0.1", "2 packets received")
	// The first one's interface works as before.
	b.has("ping -c 2 -W 10 10.77.0.2", "2 packets received")
	b.end()
	q.clean(h)
}

// What is killed leaves nothing beside the pod's links.
func TestShimNetworkKilled(t *testing.T) {
	for _, victim := range []string{"qemu", "shim", "both"} {
		t.Run(victim, func(t *testing.T) {
			h := newHost(t)
			l := h.lan()
			p := l.pod("a", 2)
			c := h.bundle("victim", "sleep", "1000").joins(p).run()
			c.has("ping -c 1 -W 10 10.77.0.1", "1 packets received")
			qemu, shim := h.find("qemu-system"), h.find("-id\x00victim\x00")
			if victim != "qemu" {
				h.must(unix.Kill(shim, unix.SIGKILL))
			}
			if victim != "shim" {
				h.must(unix.Kill(qemu, unix.SIGKILL))
			}
			if victim == "qemu" {
				if code := c.wait(""); code != 137 {
					t.Errorf("exit code %d", code)
				}
				h.sink.want(t, "exit victim victim 137")
				c.delete()
			} else {
				c.cleanup()
			}
			p.clean(h)
			if victim != "both" {
				return
			}
			// Another one starts in the same namespace.
			d := h.bundle("next", "sleep", "1000").joins(p).run()
			d.has("ping -c 1 -W 10 10.77.0.1", "1 packets received")
			d.end()
			p.clean(h)
		})
	}
}

// What happens in the namespace of a running pod happens in the guest.
func TestShimNetworkFollows(t *testing.T) {
	h := newHost(t)
	l := h.lan()
	p := h.netns("a")
	c := h.bundle("follow", "sleep", "1000").joins(p).run()
	if out := c.sh("ip -o link"); strings.Count(out, "\n") != 1 {
		t.Errorf("interfaces of an empty namespace: %s", out)
	}
	// As docker does: filled when the container runs.
	l.wire(p, "eth0", "a", 2)
	p.up(h, "eth0", "10.77.0.2/24")
	p.route(h, "eth0", "0.0.0.0/0", lan4)
	c.waitFor("ip route | grep 'default via 10.77.0.1 dev eth0'")
	c.has("ping -c 2 -W 10 10.77.0.1", "2 packets received")

	p.up(h, "eth0", "fd77::2/64")
	c.waitFor("ip addr show eth0 | grep fd77::2/64")
	p.route(h, "eth0", "192.168.9.0/24", "10.77.0.9")
	c.waitFor("ip route | grep '192.168.9.0/24 via 10.77.0.9 dev eth0'")
	h.must(p.RouteDel(&netlink.Route{Dst: cidr(h, "192.168.9.0/24"), Gw: net.ParseIP("10.77.0.9")}))
	c.waitFor("[ -z \"$(ip route show 192.168.9.0/24)\" ]")
	h.must(p.LinkSetMTU(p.link(h, "eth0"), 1300))
	c.waitFor("ip addr show eth0 | grep 'mtu 1300'")
	static := &netlink.Neigh{
		LinkIndex: p.link(h, "eth0").Attrs().Index, State: unix.NUD_PERMANENT, IP: net.ParseIP("10.77.0.99").To4(), HardwareAddr: mac(h, podMAC(99)),
	}
	h.must(p.NeighSet(static))
	c.waitFor("ip neigh | grep '10.77.0.99 dev eth0 lladdr " + podMAC(99) + "'")
	h.must(p.NeighDel(static))
	c.waitFor("! ip neigh | grep '10.77.0.99 dev eth0 lladdr'")

	// Others come and go.
	attrs := netlink.LinkAttrs{Name: "dummy9", HardwareAddr: mac(h, podMAC(9)), MTU: 1450}
	err := p.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) { // a kernel without dummy
		err = p.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "down"})
	}
	h.must(err)
	p.up(h, "dummy9", "10.78.0.1/24")
	c.waitFor("ip addr show dummy9 | grep 10.78.0.1/24")
	c.has("ip addr show dummy9", podMAC(9), "mtu 1450", "UP")
	h.must(p.LinkDel(p.link(h, "dummy9")))
	c.waitFor("! ip link show dummy9 2>/dev/null")
	c.has("ping -c 2 -W 10 10.77.0.1", "2 packets received")
	h.must(p.LinkDel(p.link(h, "eth0")))
	c.waitFor("! ip link show eth0 2>/dev/null")
	// Again, with the same name.
	l.wire(p, "eth0", "b", 3)
	p.up(h, "eth0", "10.77.0.3/24")
	c.waitFor("ping -c 1 -W 10 10.77.0.1")

	p.unmount(h) // "ip netns del": the pod goes on
	c.has("ping -c 2 -W 10 10.77.0.1", "2 packets received")
	c.end()
	p.clean(h)
}

func cidr(h *host, text string) *net.IPNet {
	h.Helper()
	_, n, err := net.ParseCIDR(text)
	h.must(err)
	return n
}

func mac(h *host, text string) net.HardwareAddr {
	h.Helper()
	hw, err := net.ParseMAC(text)
	h.must(err)
	return hw
}

// A macvlan, and a namespace that only the task process leads to.
func TestShimNetworkMacvlan(t *testing.T) {
	h := newHost(t)
	l := h.lan()
	// The other end of a wire, on which the macvlan sits: a bridge port in the lan.
	h.must(l.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "trunk"}, PeerName: "port"}))
	h.must(l.LinkSetMaster(l.link(h, "port"), l.link(h, "br0").(*netlink.Bridge)))
	h.must(l.LinkSetUp(l.link(h, "port")))
	h.must(l.LinkSetUp(l.link(h, "trunk")))

	c := h.bundle("macvlan", "sleep", "1000")
	addCaps(c.spec.Process)
	c.run()
	task, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", c.pid))
	h.must(err)
	defer task.Close()
	h.must(l.LinkAdd(&netlink.Macvlan{
		LinkAttrs: netlink.LinkAttrs{
			Name: "mv0", HardwareAddr: mac(h, podMAC(5)), ParentIndex: l.link(h, "trunk").Attrs().Index, Namespace: netlink.NsFd(task.Fd()),
		},
		Mode: netlink.MACVLAN_MODE_BRIDGE,
	}))
	p := &netns{file: task}
	h.must(p.inside(func() (err error) {
		p.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}))
	defer p.Close()
	p.up(h, "mv0", "10.77.0.5/24", "fd77::5/64")
	c.waitFor("ping -c 1 -W 10 10.77.0.1")
	c.has("ping -c 2 -W 10 fd77::1", "2 packets received")
	c.has("ip addr show mv0", podMAC(5), "inet 10.77.0.5/24", "inet6 fd77::5/64")
	c.end()
	p.clean(h)
}

// Who asks for the host's network, or another pod's, gets nothing but a reason.
func TestShimNetworkRefused(t *testing.T) {
	h := newHost(t)
	l := h.lan()
	p := l.pod("a", 2)
	refused := func(id string, change func(*tasks), words ...string) {
		t.Helper()
		c := h.bundle(id, "sleep", "1000")
		change(c)
		c.io = h.fifos(id, false)
		c.start()
		_, err := c.Create(c.ctx(), c.createRequest())
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: error %v, want %q in it", id, err, w)
			}
		}
		c.shutdown()
	}
	refused("none", func(c *tasks) {
		c.spec.Linux.Namespaces = slices.DeleteFunc(c.spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.NetworkNamespace })
	}, "host's network", "publish")
	refused("path", func(c *tasks) { c.joins(&netns{path: "/proc/self/ns/net"}) }, "host's network", "publish")
	refused("self", func(c *tasks) { c.joins(&netns{path: fmt.Sprintf("/proc/%d/ns/net", os.Getpid())}) }, "host's network", "publish")
	refused("gone", func(c *tasks) { c.joins(&netns{path: filepath.Join(h.dir, "nothing")}) }, "no such file")
	c := h.bundle("first", "sleep", "1000").joins(p).run()
	refused("second", func(c *tasks) { c.joins(p) }, `sandbox "first" has the network namespace`)
	c.has("ping -c 2 -W 10 10.77.0.1", "2 packets received")
	c.end()
	p.clean(h)
}

// Who connects to the loopback address in the pod's namespace reaches the
// guest's, as engines do to forward a port.
func TestShimNetworkForward(t *testing.T) {
	h := newHost(t)
	l := h.lan()
	p := l.pod("a", 2)
	c := h.bundle("forward", "sh", "-c", "httpd -p 127.0.0.1:8080 -h /www; httpd -p [::1]:8081 -h /www; exec nc -ll -p 8082 -e cat").joins(p)
	www := filepath.Join(c.bundle, "rootfs", "www")
	h.must(os.MkdirAll(filepath.Join(www, "cgi-bin"), 0o755))
	h.must(os.WriteFile(filepath.Join(www, "cgi-bin", "sum"), []byte("#!/bin/sh\necho\nhead -c $CONTENT_LENGTH | sha256sum\n"), 0o755))
	content, err := io.ReadAll(io.LimitReader(payload(), 2<<20))
	h.must(err)
	h.must(os.WriteFile(filepath.Join(www, "content"), content, 0o644))
	c.run()
	c.waitFor("netstat -ltn | grep 8082")
	dial := func(to string) *net.TCPConn {
		t.Helper()
		var conn net.Conn
		err := p.inside(func() (err error) {
			conn, err = net.DialTimeout("tcp", to, vmtest.Within(10*time.Second))
			return err
		})
		h.must(err)
		t.Cleanup(func() { conn.Close() })
		h.must(conn.SetDeadline(time.Now().Add(patience)))
		return conn.(*net.TCPConn)
	}
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(_ context.Context, _, to string) (net.Conn, error) { return dial(to), nil },
	}}
	want := fmt.Sprintf("%x", sha256.Sum256(content))
	for _, server := range []string{"127.0.0.1:8080", "[::1]:8081"} { // on loopback only
		r, err := client.Get("http://" + server + "/content")
		h.must(err)
		sum := sha256.New()
		if _, err := io.Copy(sum, r.Body); err != nil || fmt.Sprintf("%x", sum.Sum(nil)) != want {
			t.Errorf("GET from %s: %x, %v", server, sum.Sum(nil), err)
		}
		r.Body.Close()
		r, err = client.Post("http://"+server+"/cgi-bin/sum", "application/octet-stream", bytes.NewReader(content))
		h.must(err)
		if got, err := io.ReadAll(r.Body); err != nil || !strings.HasPrefix(string(got), want) {
			t.Errorf("POST to %s: %q, %v", server, got, err)
		}
		r.Body.Close()
	}
	for _, to := range []string{"127.0.0.1:8082", "10.77.0.2:8082"} {
		conn := dial(to)
		for _, text := range []string{"hello", "again"} {
			_, err := io.WriteString(conn, text)
			h.must(err)
			got := make([]byte, 5)
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
				t.Errorf("%s: answer %q, %v", to, got, err)
			}
		}
		h.must(conn.CloseWrite())
		if got, err := io.ReadAll(conn); err != nil || len(got) != 0 {
			t.Errorf("%s: rest %q, %v", to, got, err)
		}
	}
	// Nobody listens: reset, perhaps before the dialer looks.
	err = p.inside(func() error {
		conn, err := net.DialTimeout("tcp", "127.0.0.1:9", vmtest.Within(10*time.Second))
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, err = io.ReadAll(conn)
		return err
	})
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("where nobody listens: %v", err)
	}
	c.end()
	p.clean(h)
	if err := p.inside(func() error {
		_, err := net.DialTimeout("tcp", "127.0.0.1:8080", vmtest.Within(10*time.Second))
		return err
	}); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("after the end: %v", err)
	}
}

// The other model has the same to show, with a pair of queues for each CPU.
func TestShimNetworkMacvtap(t *testing.T) {
	h := newHost(t, "network = { model = 'macvtap' }", "annotations = ['io.vmshim.vcpus']")
	l := h.lan()
	p := l.pod("a", 2)
	c := h.bundle("macvtap", "sleep", "1000").joins(p)
	c.spec.Annotations = map[string]string{"io.vmshim.vcpus": "2"}
	c.run()
	c.has("ip addr show eth0", "mtu 1380", podMAC(2), "UP", "inet 10.77.0.2/24", "inet6 fd77::2/64")
	c.has("ls /sys/class/net/eth0/queues", "rx-1", "tx-1")
	c.has("ping -c 3 -W 10 10.77.0.1", "3 packets received")
	c.has("ping -c 3 -W 10 fd77::1", "3 packets received")
	h.must(unix.Kill(h.find("-id\x00macvtap\x00"), unix.SIGKILL))
	c.cleanup()
	p.clean(h)
}
