package shim

import (
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
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
				c.delete()
			} else {
				c.cleanup()
			}
			p.clean(h)
			// Another one starts in the same namespace.
			d := h.bundle("next", "sleep", "1000").joins(p).run()
			d.has("ping -c 1 -W 10 10.77.0.1", "1 packets received")
			d.end()
			p.clean(h)
		})
	}
}
