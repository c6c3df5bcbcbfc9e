package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/internal/thread"
)

// What is said over a connection between host and container. The host begins;
// the container answers with doneByte when it has everything.
const (
	pingByte = 'p' // nothing else
	downByte = 'd' // the volume follows
	upByte   = 'u' // the volume is wanted
	doneByte = '.'

	pings   = 500
	netPort = 5006
)

// network measures between the host and a pod: one card of the machine is a veth
// of the pod's namespace, as CNI makes it; from another one of the same machine
// the tap is taken away, so that the host has it bare. runc's container has a
// veth.
func (r *rig) network(ctx context.Context, res *results) (err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	pod, err := r.netns(&undo, "pod")
	if err != nil {
		return err
	}
	plain, err := r.netns(&undo, "plain")
	if err != nil {
		return err
	}
	var lans []*wire
	for i, end := range []*netns{pod, pod, plain} {
		w, err := r.wire(&undo, i, end)
		if err != nil {
			return err
		}
		lans = append(lans, w)
	}
	machine, err := r.join(ctx, &undo, machineRuntime, pod)
	if err != nil {
		return err
	}
	if err := lans[1].bare(pod); err != nil {
		return fmt.Errorf("bare tap: %w", err)
	}
	runc, err := r.join(ctx, &undo, runcRuntime, plain)
	if err != nil {
		return err
	}
	pairs := []*pair{{name: "bare tap"}, {name: "pod"}, {name: "runc's veth"}}
	for i, in := range []struct {
		*container
		*wire
	}{{machine, lans[1]}, {machine, lans[0]}, {runc, lans[2]}} {
		if err := pairs[i].connect(ctx, &undo, in.container, in.wire); err != nil {
			return fmt.Errorf("%s: %w", pairs[i].name, err)
		}
	}
	for range 3 * r.runs {
		for _, p := range pairs {
			if err := p.measure(); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	report(res, pairs[0], pairs[1], pairs[2])
	return nil
}

func report(res *results, tap, pod, veth *pair) {
	for _, m := range []struct {
		name  string
		value func(*pair) float64
		unit  string
		tap   result
	}{
		{"TCP, host to container", func(p *pair) float64 { return rate(p.down) }, "MiB/s", result{AtLeast: 0.9}},
		{"TCP, container to host", func(p *pair) float64 { return rate(p.up) }, "MiB/s", result{AtLeast: 0.9}},
		{"TCP, round trip", func(p *pair) float64 { return median(p.trips) }, "ms", result{}},
	} {
		base := func(p *pair) string { return m.name + ", " + p.name }
		for _, p := range []*pair{tap, veth} {
			res.add(result{Name: base(p), Value: m.value(p), Unit: m.unit})
		}
		of := m.tap
		of.Name, of.Value, of.Unit, of.Against = base(pod), m.value(pod), m.unit, base(tap)
		res.add(of)
		res.add(result{Name: base(pod) + ", beside runc's", Value: m.value(pod), Unit: m.unit, Against: base(veth)})
	}
}

// A netns is a network namespace at a path.
type netns struct {
	*netlink.Handle
	file *os.File
	path string
}

func (r *rig) netns(undo *cleanup.Stack, name string) (*netns, error) {
	n := &netns{path: filepath.Join(r.local.Dir, name)}
	if err := os.WriteFile(n.path, nil, 0o600); err != nil {
		return nil, err
	}
	err := thread.Run(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", n.path, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		undo.Add(func() error { return unix.Unmount(n.path, unix.MNT_DETACH) })
		n.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	undo.Add(func() error { n.Close(); return nil })
	if n.file, err = os.Open(n.path); err != nil {
		return nil, err
	}
	undo.Add(n.file.Close)
	return n, nil
}

// up gives a link its address, in a network of two.
func (n *netns) up(name string, addr netip.Prefix) error {
	link, err := n.LinkByName(name)
	if err != nil {
		return err
	}
	parsed, err := netlink.ParseAddr(addr.String())
	if err != nil {
		return err
	}
	return errors.Join(n.AddrAdd(link, parsed), n.LinkSetUp(link))
}

// A wire is a veth between a namespace that stands for the host and a pod's.
type wire struct {
	host        *netns
	name        string // of the link in the pod
	here, there netip.Prefix
}

func (r *rig) wire(undo *cleanup.Stack, i int, pod *netns) (*wire, error) {
	host, err := r.netns(undo, fmt.Sprintf("host%d", i))
	if err != nil {
		return nil, err
	}
	w := &wire{
		host: host, name: fmt.Sprintf("eth%d", i%2),
		here:  netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 90, byte(i), 1}), 24),
		there: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 90, byte(i), 2}), 24),
	}
	err = host.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "wire"}, PeerName: w.name, PeerNamespace: netlink.NsFd(pod.file.Fd()),
	})
	if err == nil {
		err = errors.Join(host.up("wire", w.here), pod.up(w.name, w.there))
	}
	return w, err
}

// bare takes the tap that serves the wire's link in the pod to the host's
// namespace, in the place of the wire.
func (w *wire) bare(pod *netns) error {
	link, err := pod.LinkByName(w.name)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("vmshim%d", link.Attrs().Index)
	tap, err := pod.LinkByName(name)
	if err != nil {
		return fmt.Errorf("tap of %s: %w", w.name, err)
	}
	wire, err := w.host.LinkByName("wire")
	if err != nil {
		return err
	}
	if err := errors.Join(w.host.LinkSetDown(wire), pod.LinkSetNsFd(tap, int(w.host.file.Fd()))); err != nil {
		return err
	}
	return w.host.up(name, w.here)
}

// join runs a container in the namespace, with this program in it.
func (r *rig) join(ctx context.Context, undo *cleanup.Stack, runtime string, n *netns) (*container, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c, err := r.launch(ctx, runtime, "--with-ns", "network:"+n.path, "--mount", "type=bind,src="+self+",dst=/bench,options=rbind:ro")
	if err == nil {
		undo.Add(func() error { return c.remove(ctx) })
	}
	return c, err
}

// A pair is the host and a container, and what was measured between them.
type pair struct {
	name            string
	conn            net.Conn
	down, up, trips []time.Duration
}

func (p *pair) connect(ctx context.Context, undo *cleanup.Stack, c *container, w *wire) error {
	var l *net.TCPListener
	err := thread.Run(func() (err error) {
		if err := unix.Setns(int(w.host.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(w.here.Addr(), netPort)))
		return err
	})
	if err != nil {
		return err
	}
	defer l.Close()
	client, err := c.exec(ctx, "/bench", guestCommand, actNet, l.Addr().String())
	if err != nil {
		return err
	}
	undo.Add(func() error { return client.end(context.WithoutCancel(ctx)) })
	if err := l.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	if p.conn, err = l.Accept(); err != nil {
		return err
	}
	undo.Add(p.conn.Close)
	return p.conn.SetDeadline(time.Now().Add(30 * time.Minute))
}

// measure adds one of each. What is written has arrived when the answer comes.
func (p *pair) measure() error {
	for _, m := range []struct {
		times *[]time.Duration
		n     int
		f     func() error
	}{
		{&p.down, 1, func() error { return errors.Join(p.say(downByte), pour(p.conn), p.hear()) }},
		{&p.up, 1, func() error {
			err := p.say(upByte)
			if err == nil {
				_, err = io.CopyN(io.Discard, p.conn, volume)
			}
			return errors.Join(err, p.hear())
		}},
		{&p.trips, pings, func() error { return errors.Join(p.say(pingByte), p.hear()) }},
	} {
		began := time.Now()
		for range m.n {
			if err := m.f(); err != nil {
				return err
			}
		}
		*m.times = append(*m.times, time.Since(began)/time.Duration(m.n))
	}
	return nil
}

func (p *pair) say(b byte) error {
	_, err := p.conn.Write([]byte{b})
	return err
}

func (p *pair) hear() error {
	b := make([]byte, 1)
	_, err := io.ReadFull(p.conn, b)
	if err == nil && b[0] != doneByte {
		err = fmt.Errorf("answer %q", b)
	}
	return err
}

// obey is the container's end.
func obey(address string) error {
	conn, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	what := make([]byte, 1)
	for {
		if _, err := io.ReadFull(conn, what); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		switch what[0] {
		case downByte:
			_, err = io.CopyN(io.Discard, conn, volume)
		case upByte:
			err = pour(conn)
		}
		if err == nil {
			_, err = conn.Write([]byte{doneByte})
		}
		if err != nil {
			return err
		}
	}
}
