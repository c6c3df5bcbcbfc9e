package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

const podMAC = "02:00:00:00:01:02"

// A pod is a network namespace with eth0 in it, at a path.
type pod struct {
	*netlink.Handle
	t    *testing.T
	path string
}

func newPod(t *testing.T) *pod {
	t.Helper()
	need.Root(t)
	p := &pod{t: t, path: t.TempDir() + "/ns"}
	p.must(os.WriteFile(p.path, nil, 0o600))
	p.must(thread.Run(p.make))
	t.Cleanup(func() {
		p.Close()
		p.must(unix.Unmount(p.path, unix.MNT_DETACH))
	})
	return p
}

func (p *pod) make() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	if err := unix.Mount("/proc/thread-self/ns/net", p.path, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	var err error
	if p.Handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	mac, _ := net.ParseMAC(podMAC)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU = "eth0", mac, 1400
	if err := p.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
		return err
	}
	link, err := p.LinkByName("eth0")
	if err != nil {
		return err
	}
	addr, _ := netlink.ParseAddr("10.5.0.2/24")
	return errors.Join(p.AddrAdd(link, addr), p.LinkSetUp(link))
}

func (p *pod) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// clean asserts that nothing of ours is in the namespace.
func (p *pod) clean() {
	p.t.Helper()
	links, err := p.LinkList()
	p.must(err)
	for _, l := range links {
		qdiscs, err := p.QdiscList(l)
		p.must(err)
		for _, q := range qdiscs {
			if q.Type() == "ingress" {
				p.t.Errorf("left: ingress qdisc of %s", l.Attrs().Name)
			}
		}
		if strings.HasPrefix(l.Attrs().Name, "vmshim") {
			p.t.Errorf("left: %s", l.Attrs().Name)
		}
	}
}

func (p *pod) spec() *specs.Spec {
	spec := testSpec()
	for i := range spec.Linux.Namespaces {
		if ns := &spec.Linux.Namespaces[i]; ns.Type == specs.NetworkNamespace {
			ns.Path = p.path
		}
	}
	return spec
}

// TestRootNetwork has a container in a namespace with an interface.
func TestRootNetwork(t *testing.T) {
	p := newPod(t)
	e := newEnv(t)
	told := make(chan *protocol.UpdateInterfaceRequest, 8)
	e.peer.Handle("UpdateInterface", func(_ context.Context, req proto.Message) (proto.Message, error) {
		r := req.(*protocol.UpdateInterfaceRequest)
		told <- r
		return r.GetInterface(), nil
	})
	e.peer.Handle("UpdateRoutes", func(_ context.Context, req proto.Message) (proto.Message, error) {
		return req.(*protocol.UpdateRoutesRequest).GetRoutes(), nil
	})
	s := e.running()
	cfg := e.config("c")
	cfg.Spec = p.spec()
	if _, err := s.CreateContainer(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	i := (<-told).GetInterface()
	if i.GetName() != "eth0" || i.GetHwAddr() != podMAC || i.GetMtu() != 1400 || i.GetDevicePath() != "02/01" || len(i.GetIPAddresses()) != 1 {
		t.Errorf("interface %v", i)
	}
	st, err := ReadState(e.opts.Dir)
	if err != nil || st.Network == nil || st.Network.Path != p.path || len(st.Network.Links) != 1 || st.Network.Links[0].Name != "eth0" {
		t.Errorf("state %+v, %v", st, err)
	}
	// A change is followed.
	link, err := p.LinkByName("eth0")
	p.must(err)
	p.must(p.LinkSetMTU(link, 1300))
	select {
	case r := <-told:
		if r.GetInterface().GetMtu() != 1300 {
			t.Errorf("interface %v", r.GetInterface())
		}
	case <-time.After(10 * time.Second):
		t.Error("a change was not followed")
	}

	// Another container may say the same, or nothing; not something else.
	same, own, other := e.config("same"), e.config("own"), e.config("other")
	same.Spec, other.Spec = p.spec(), newPod(t).spec()
	for _, cfg := range []ContainerConfig{same, own} {
		if _, err := s.CreateContainer(t.Context(), cfg); err != nil {
			t.Error(err)
		}
	}
	_, err = s.CreateContainer(t.Context(), other)
	fails(t, err, errdefs.ErrInvalidArgument, "share one network namespace")

	// Nor may another sandbox have it.
	e2 := newEnv(t)
	e2.root = e.root
	e2.opts.ID, e2.opts.Dir = "second", Dir(e.root, "/run/containerd.sock", "ns", "second")
	s2 := e2.running()
	cfg = e2.config("d")
	cfg.Spec = p.spec()
	_, err = s2.CreateContainer(t.Context(), cfg)
	fails(t, err, errdefs.ErrAlreadyExists, "in use by the machine")

	if err := s.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	p.clean()
}

func TestForgotten(t *testing.T) {
	list := func(entries ...string) *protocol.ARPNeighbors { // "device ip mac"
		all := &protocol.ARPNeighbors{}
		for _, e := range entries {
			f := strings.Fields(e)
			all.ARPNeighbors = append(all.ARPNeighbors, &types.ARPNeighbor{
				Device: f[0], ToIPAddress: &types.IPAddress{Address: f[1]}, Lladdr: f[2], State: unix.NUD_PERMANENT,
			})
		}
		return all
	}
	told := list("eth0 10.0.0.1 a", "eth0 10.0.0.2 b", "eth1 10.0.0.1 c", "eth2 10.0.0.1 d")
	got := forgotten(told, list("eth0 10.0.0.1 other"), map[string]bool{"eth0": true, "eth1": true})
	want := list("eth0 10.0.0.2 b", "eth1 10.0.0.1 c").ARPNeighbors
	for _, e := range want {
		e.State = unix.NUD_FAILED
	}
	if !proto.Equal(&protocol.ARPNeighbors{ARPNeighbors: want}, &protocol.ARPNeighbors{ARPNeighbors: got}) {
		t.Errorf("forgotten %v, want %v", got, want)
	}
	if got := forgotten(nil, told, nil); got != nil {
		t.Errorf("forgotten of nothing: %v", got)
	}
}

// TestRootNetworkFails leaves a namespace as it was.
func TestRootNetworkFails(t *testing.T) {
	p := newPod(t)
	link, err := p.LinkByName("eth0")
	p.must(err)
	e := newEnv(t)
	e.plugNIC = errors.New("no slot")
	s := e.running()
	cfg := e.config("c")
	cfg.Spec = p.spec()
	_, err = s.CreateContainer(t.Context(), cfg)
	fails(t, err, e.plugNIC, "join network")
	p.clean()

	foreign := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
	p.must(p.QdiscAdd(foreign))
	_, err = s.CreateContainer(t.Context(), cfg)
	fails(t, err, nil, "somebody else")
	p.must(p.QdiscDel(foreign)) // it is there
	p.clean()
}

// A guest that says at once that there is no card is asked again, but not all
// the time, and no longer than the caller waits.
func TestUntilFound(t *testing.T) {
	missing := fmt.Errorf("interface: %w", errdefs.ErrNotFound)
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), cardTimeout)
		defer cancel()
		asked, began := 0, time.Now()
		err := untilFound(ctx, func() error { asked++; return missing })
		if !errdefs.IsNotFound(err) || time.Since(began) != cardTimeout || asked < 30 || asked > 60 {
			t.Errorf("%v after %v and %d calls", err, time.Since(began), asked)
		}
		began = time.Now()
		left := 3
		err = untilFound(t.Context(), func() error {
			if left--; left > 0 {
				return missing
			}
			return nil
		})
		if err != nil || time.Since(began) > 100*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if err := untilFound(t.Context(), func() error { return errdefs.ErrUnavailable }); !errdefs.IsUnavailable(err) {
			t.Errorf("another error: %v", err)
		}
	})
}
