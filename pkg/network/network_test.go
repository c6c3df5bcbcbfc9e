package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
)

// A pod is a throw-away namespace, with links in it, and another one at the
// other end of its wires.
type pod struct {
	*Namespace
	t     *testing.T
	other *Namespace
}

func testNamespace(t *testing.T) *Namespace {
	t.Helper()
	need.Root(t)
	n, err := newNamespace()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func newPod(t *testing.T) *pod {
	t.Helper()
	return &pod{testNamespace(t), t, testNamespace(t)}
}

func (p *pod) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// veth makes a wire to the other namespace: eth0 here, host0 there, up.
func (p *pod) veth(mac string, addrs ...string) netlink.Link {
	p.t.Helper()
	hw, err := net.ParseMAC(mac)
	p.must(err)
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: 1400, HardwareAddr: hw}, PeerName: "host0",
	}
	p.must(p.handle.LinkAdd(veth))
	peer, err := p.handle.LinkByName("host0")
	p.must(err)
	p.must(p.other.control(func(fd int) error { return p.handle.LinkSetNsFd(peer, fd) }))
	peer, err = p.other.handle.LinkByName("host0")
	p.must(err)
	p.must(p.other.handle.LinkSetUp(peer))
	return p.up("eth0", addrs...)
}

func (p *pod) up(name string, addrs ...string) netlink.Link {
	p.t.Helper()
	link, err := p.handle.LinkByName(name)
	p.must(err)
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		p.must(err)
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		p.must(p.handle.AddrAdd(link, addr))
	}
	p.must(p.handle.LinkSetUp(link))
	link, err = p.handle.LinkByName(name)
	p.must(err)
	return link
}

// wantClean asserts that nothing of ours is in the namespace.
func (p *pod) wantClean() {
	p.t.Helper()
	links, err := p.handle.LinkList()
	p.must(err)
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Alias, aliasPrefix) || strings.HasPrefix(l.Attrs().Name, "vmshim") {
			p.t.Errorf("left: %s", l.Attrs().Name)
		}
		qdiscs, err := p.handle.QdiscList(l)
		p.must(err)
		for _, q := range qdiscs {
			if q.Type() == "ingress" {
				p.t.Errorf("left: ingress qdisc of %s", l.Attrs().Name)
			}
		}
	}
}

// noDevices has temporary files where no device can be opened, as systemd's /tmp.
func (p *pod) noDevices() {
	p.t.Helper()
	dir := p.t.TempDir()
	p.must(unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, ""))
	p.t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	p.t.Setenv("TMPDIR", dir)
}

// TestAttach moves frames from the wire to the tap and back, and leaves nothing.
func TestAttach(t *testing.T) {
	for name, tt := range map[string]struct {
		queues int
		model  Model
	}{"tc": {1, TC}, "tc with queues": {2, ""}, "macvtap": {1, Macvtap}, "macvtap with queues": {2, Macvtap}} {
		t.Run(name, func(t *testing.T) {
			queues, cfg := tt.queues, Config{Model: tt.model, Vhost: "off"}
			p := newPod(t)
			p.noDevices()
			eth0 := p.veth("02:00:00:00:00:02", "10.1.0.2/24")
			id := LinkID{eth0.Attrs().Index, "eth0"}
			a, err := p.Attach(id, "sb", queues, cfg)
			p.must(err)
			if len(a.Taps) != queues || len(a.Vhost) != 0 {
				t.Errorf("%d taps, %d of vhost-net", len(a.Taps), len(a.Vhost))
			}
			tap, err := p.handle.LinkByName(tapName(id.Index))
			p.must(err)
			if got := tap.Attrs(); got.MTU != 1400 || got.Alias != "vmshim:sb" || got.Flags&net.FlagUp == 0 {
				t.Errorf("tap %+v", got)
			}
			s, err := p.Scan()
			p.must(err)
			if plan := NewPlan(s); len(plan.Endpoints) != 1 || len(plan.LeftOut) != 0 {
				t.Errorf("plan with a tap of ours: %+v", plan)
			}
			p.exchange(a)
			if _, err := p.Attach(id, "sb", queues, cfg); err == nil {
				t.Error("attached twice")
			}
			p.exchange(a) // the second attempt did no harm
			p.must(a.Close())
			p.must(p.Detach(tt.model, id))
			p.wantClean()
			p.must(p.Detach(tt.model, id)) // again

			// What a killed process leaves, and what works after that.
			a, err = p.Attach(id, "sb", queues, cfg)
			p.must(err)
			p.must(a.Close())
			p.must(p.Detach(tt.model, id))
			p.wantClean()
			p.pinged()
			// With the machine still there.
			a, err = p.Attach(id, "sb", queues, cfg)
			p.must(err)
			p.must(p.Detach(tt.model, id))
			p.wantClean()
			p.pinged()
			p.must(a.Close())
		})
	}
}

// frame is one of a type that nobody has.
func frame(dst, src, text string) []byte {
	d, _ := net.ParseMAC(dst)
	s, _ := net.ParseMAC(src)
	b := append(append(append([]byte{}, d...), s...), 0x88, 0xb5) // IEEE local experimental
	b = append(b, text...)
	return append(b, make([]byte, max(0, 60-len(b)))...)
}

// raw opens a packet socket on a link of the other namespace.
func (p *pod) raw() int {
	p.t.Helper()
	var fd int
	p.must(p.other.inside(func() (err error) {
		link, err := p.other.handle.LinkByName("host0")
		if err != nil {
			return err
		}
		proto := int(0x88b5>>8 | 0x88b5<<8&0xff00)
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: link.Attrs().Index})
	}))
	p.t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func (p *pod) exchange(a *Attachment) {
	p.t.Helper()
	const vnetHdr = 10 // struct virtio_net_hdr
	fd := p.raw()
	guest := "02:00:00:00:00:02"
	out := frame("ff:ff:ff:ff:ff:ff", guest, "from the guest")
	if _, err := a.Taps[0].Write(append(make([]byte, vnetHdr), out...)); err != nil {
		p.t.Fatal(err)
	}
	buf := make([]byte, 2000)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil || !strings.Contains(string(buf[:n]), "from the guest") {
		p.t.Fatalf("host got %q, %v", buf[:n], err)
	}
	if _, err := unix.Write(fd, frame(guest, "02:00:00:00:00:01", "from the host")); err != nil {
		p.t.Fatal(err)
	}
	found := make(chan struct{}, len(a.Taps))
	for _, f := range a.Taps {
		go func() {
			buf := make([]byte, 2000)
			for {
				n, err := f.Read(buf)
				if err != nil {
					return
				}
				if strings.Contains(string(buf[:n]), "from the host") {
					found <- struct{}{}
					return
				}
			}
		}()
	}
	select {
	case <-found:
	case <-time.After(5 * time.Second):
		p.t.Fatal("guest got nothing")
	}
	for _, f := range a.Taps { // ends the others
		_ = f.SetReadDeadline(time.Now())
		_ = f.SetReadDeadline(time.Time{})
	}
}

// pinged sends a frame to the link itself: it works as before.
func (p *pod) pinged() {
	p.t.Helper()
	var fd int
	p.must(p.inside(func() (err error) {
		proto := int(0x88b5>>8 | 0x88b5<<8&0xff00)
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto); err != nil {
			return err
		}
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	}))
	defer unix.Close(fd)
	if _, err := unix.Write(p.raw(), frame("02:00:00:00:00:02", "02:00:00:00:00:01", "to the link")); err != nil {
		p.t.Fatal(err)
	}
	buf := make([]byte, 2000)
	if n, _, err := unix.Recvfrom(fd, buf, 0); err != nil || !strings.Contains(string(buf[:n]), "to the link") {
		p.t.Errorf("link got %q, %v", buf[:n], err)
	}
}

// A link whose arrivals somebody filters is left alone.
func TestAttachRefused(t *testing.T) {
	p := newPod(t)
	eth0 := p.veth("02:00:00:00:00:02")
	p.must(p.handle.QdiscAdd(ingress(eth0.Attrs().Index)))
	_, err := p.Attach(LinkID{eth0.Attrs().Index, "eth0"}, "sb", 1, Config{})
	if err == nil || !strings.Contains(err.Error(), "somebody else") {
		t.Errorf("error %v", err)
	}
	if links, err := p.handle.LinkList(); err != nil || len(links) != 2 {
		t.Errorf("links %v, %v", links, err)
	}
	if _, err := p.Attach(LinkID{99, "eth9"}, "sb", 1, Config{}); err == nil {
		t.Error("attached nothing")
	}
	if _, err := p.Attach(LinkID{eth0.Attrs().Index, "eth0"}, "sb", 1, Config{Vhost: "on"}); !errors.Is(err, os.ErrNotExist) {
		if _, serr := os.Stat(vhostPath); serr != nil {
			t.Errorf("error %v", err)
		}
	}
}

func TestLock(t *testing.T) {
	p := newPod(t)
	lock, err := p.Lock()
	p.must(err)
	_, err = p.Lock()
	var taken *TakenError
	if !errors.As(err, &taken) || taken.PID != os.Getpid() {
		t.Errorf("error %v", err)
	}
	other, err := p.other.Lock()
	p.must(err)
	p.must(other.Close())
	p.must(lock.Close())
	lock, err = p.Lock()
	p.must(err)
	p.must(lock.Close())
}

func TestIsHost(t *testing.T) {
	p := newPod(t)
	for path, want := range map[string]bool{
		"/proc/self/ns/net": true, fmt.Sprintf("/proc/self/fd/%d", p.file.Fd()): false,
	} {
		if got, err := IsHost(path); err != nil || got != want {
			t.Errorf("%s: %v, %v", path, got, err)
		}
	}
	if _, err := IsHost(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// TestWatch sees each kind of change.
func TestWatch(t *testing.T) {
	p := newPod(t)
	ctx, cancel := contextOf(t)
	changes, err := p.Watch(ctx)
	p.must(err)
	seen := func(what string, do func()) {
		t.Helper()
		for {
			select {
			case <-changes:
				continue
			case <-time.After(50 * time.Millisecond): // quiet
			}
			break
		}
		do()
		select {
		case <-changes:
		case <-time.After(5 * time.Second):
			t.Errorf("%s was not seen", what)
		}
	}
	var eth0 netlink.Link
	seen("a link", func() { eth0 = p.veth("02:00:00:00:00:02") })
	seen("an address", func() { p.up("eth0", "10.1.0.2/24") })
	seen("another address", func() { p.up("eth0", "fd00::2/64") })
	seen("a route", func() {
		_, dst, _ := net.ParseCIDR("10.2.0.0/16")
		p.must(p.handle.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP("10.1.0.1")}))
	})
	seen("a removal", func() { p.must(p.handle.LinkDel(eth0)) })
	cancel()
	select {
	case <-drained(changes):
	case <-time.After(5 * time.Second):
		t.Error("the watch does not end")
	}
}

func TestTry(t *testing.T) {
	testNamespace(t)
	vhost, err := Try(Config{})
	if err != nil {
		t.Error(err)
	}
	t.Logf("vhost-net: %v", vhost)
}
