package shim

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
)

// A netns is a network namespace that lasts until its path is unmounted and
// nobody else has it.
type netns struct {
	*netlink.Handle
	path string
	file *os.File
}

// netns makes one, below the host's directory.
func (h *host) netns(name string) *netns {
	h.Helper()
	n := &netns{path: filepath.Join(h.dir, "n-"+name)}
	if err := os.WriteFile(n.path, nil, 0o600); err != nil {
		h.Fatal(err)
	}
	err := thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", n.path, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		var err error
		if n.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		n.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() {
		n.Close()
		n.file.Close()
		n.unmount(h)
	})
	h.must(n.LinkSetUp(n.link(h, "lo")))
	return n
}

func (n *netns) unmount(h *host) {
	h.Helper()
	if err := unix.Unmount(n.path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		h.Error(err)
	}
}

// inside calls f on a thread in the namespace.
func (n *netns) inside(f func() error) error {
	return thread.Run(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

func (n *netns) link(h *host, name string) netlink.Link {
	h.Helper()
	link, err := n.LinkByName(name)
	if err != nil {
		h.Fatalf("%s: %v", name, err)
	}
	return link
}

func (h *host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// up gives a link addresses and sets it up.
func (n *netns) up(h *host, name string, addrs ...string) {
	h.Helper()
	link := n.link(h, name)
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		h.must(err)
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		h.must(n.AddrAdd(link, addr))
	}
	h.must(n.LinkSetUp(link))
}

func (n *netns) route(h *host, link, dst, gw string) {
	h.Helper()
	r := &netlink.Route{LinkIndex: n.link(h, link).Attrs().Index}
	if gw != "" {
		r.Gw = net.ParseIP(gw)
	} else {
		r.Scope = unix.RT_SCOPE_LINK
	}
	_, to, err := net.ParseCIDR(dst)
	h.must(err)
	r.Dst = to
	h.must(n.RouteAdd(r))
}

// clean asserts that nothing of ours is in the namespace.
func (n *netns) clean(h *host) {
	h.Helper()
	links, err := n.LinkList()
	h.must(err)
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "vmshim") {
			h.Errorf("left: link %s", l.Attrs().Name)
		}
		qdiscs, err := n.QdiscList(l)
		h.must(err)
		for _, q := range qdiscs {
			if q.Type() == "ingress" {
				h.Errorf("left: ingress qdisc of %s", l.Attrs().Name)
			}
		}
	}
}

// A lan is a bridge in a namespace of its own, as a CNI plugin makes on a host.
type lan struct {
	*netns
	h *host
}

const (
	lan4, lan6 = "10.77.0.1", "fd77::1"
	podMTU     = 1380
	sourcePort = 7001 // sends payload and ends
	sinkPort   = 7002 // takes all, and answers its sha256
)

func (h *host) lan() *lan {
	l := &lan{h.netns("lan"), h}
	h.must(l.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
	l.up(h, "br0", lan4+"/24", lan6+"/64")
	l.serve(sourcePort, func(conn net.Conn) {
		_, _ = io.Copy(conn, payload())
	})
	l.serve(sinkPort, func(conn net.Conn) {
		sum := sha256.New()
		_, _ = io.Copy(sum, conn)
		fmt.Fprintf(conn, "%x\n", sum.Sum(nil))
	})
	return l
}

// payloadLines are 64 MiB.
var payloadLines = 8_400_000

// moveMore has the payload be 1 GiB, and waits longer.
func moveMore() { payloadLines, patience = 119_000_000, 5*patience }

// payload is what "seq 1 payloadLines" prints: no two pages of it are the same.
func payload() io.Reader {
	r, w := io.Pipe()
	go func() {
		b := bufio.NewWriterSize(w, 1<<20)
		for i := 1; i <= payloadLines; i++ {
			if _, err := b.Write(append(strconv.AppendInt(b.AvailableBuffer(), int64(i), 10), '\n')); err != nil {
				break
			}
		}
		_ = b.Flush()
		_ = w.Close()
	}()
	return r
}

func writePayload(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, payload())
	return errors.Join(err, f.Close())
}

func payloadSum() string {
	sum := sha256.New()
	_, _ = io.Copy(sum, payload())
	return fmt.Sprintf("%x", sum.Sum(nil))
}

func (l *lan) serve(port int, f func(net.Conn)) {
	l.h.Helper()
	var listener net.Listener
	l.h.must(l.inside(func() (err error) {
		listener, err = net.Listen("tcp", ":"+strconv.Itoa(port))
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(10 * time.Minute))
				f(conn)
			}()
		}
	}()
	l.h.Cleanup(func() {
		listener.Close()
		<-done
	})
}

// pod makes a namespace with eth0 on the bridge, as a CNI plugin does.
func (l *lan) pod(name string, n int) *netns {
	l.h.Helper()
	p := l.h.netns(name)
	l.wire(p, "eth0", name, n)
	p.up(l.h, "eth0", fmt.Sprintf("10.77.0.%d/24", n), fmt.Sprintf("fd77::%d/64", n))
	p.route(l.h, "eth0", "0.0.0.0/0", lan4)
	p.route(l.h, "eth0", "::/0", lan6)
	return p
}

// wire puts a veth into a pod, the other end on the bridge.
func (l *lan) wire(p *netns, link, name string, n int) {
	l.h.Helper()
	mac, _ := net.ParseMAC(podMAC(n))
	br := l.link(l.h, "br0")
	attrs := netlink.LinkAttrs{Name: "v" + name, MTU: podMTU, MasterIndex: br.Attrs().Index}
	l.h.must(l.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: link, PeerHardwareAddr: mac, PeerMTU: podMTU, PeerNamespace: netlink.NsFd(p.file.Fd()),
	}))
	l.h.must(l.LinkSetUp(l.link(l.h, "v"+name)))
}

func podMAC(n int) string { return fmt.Sprintf("02:00:00:00:77:%02x", n) }

// joins makes the task one of the pod's.
func (t *tasks) joins(n *netns) *tasks {
	for i := range t.spec.Linux.Namespaces {
		if ns := &t.spec.Linux.Namespaces[i]; ns.Type == specs.NetworkNamespace {
			ns.Path = n.path
		}
	}
	addCaps(t.spec.Process)
	return t
}

func addCaps(p *specs.Process) {
	for _, set := range []*[]string{&p.Capabilities.Bounding, &p.Capabilities.Effective, &p.Capabilities.Permitted} {
		*set = append((*set)[:len(*set):len(*set)], "CAP_NET_RAW", "CAP_NET_ADMIN")
	}
}

var runs int

// sh runs a command in the container and returns what it prints.
func (t *tasks) sh(command string) string {
	t.Helper()
	runs++
	id := fmt.Sprintf("x%d", runs)
	f := t.fifos(t.id+"-"+id, false).read()
	t.exec(id, f, addCaps, "sh", "-c", command)
	code := t.wait(id)
	out := f.output()
	if code != 0 {
		out += fmt.Sprintf("exit code %d: %s", code, f.stderrText())
	}
	t.sink.want(t, fmt.Sprintf("exit %s %s %d", t.id, id, code))
	t.deleteExec(id)
	return out
}

// has asserts what a command in the container prints.
func (t *tasks) has(command string, want ...string) {
	t.Helper()
	out := t.sh(command)
	for _, text := range want {
		if !strings.Contains(out, text) {
			t.Errorf("%s: no %q in\n%s", command, text, out)
		}
	}
}

// waitFor waits until a command in the container succeeds.
func (t *tasks) waitFor(command string) {
	t.Helper()
	out := t.sh("n=0; until " + command + "; do n=$((n+1)); [ $n -lt 300 ] || exit 9; sleep 0.1; done")
	if strings.Contains(out, "exit code") {
		t.Errorf("%s: %s\n%s", command, out, t.sh("ip addr; ip route; ip -6 route"))
	}
}
