package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/network"
)

// The sandbox's network: the interfaces of one network namespace of the host
// are cards of the machine. The namespace is that of the first container's task
// process, once hooks have filled it; cards are plugged while the guest boots,
// and configured when it answers. From then on a goroutine follows what changes
// there.

// NetworkState is what finds the network again.
type NetworkState struct {
	// Path led to the namespace when it was joined.
	Path string     `json:"path"`
	ID   network.ID `json:"id"`
	// Model is how links were attached.
	Model network.Model `json:"model,omitempty"`
	// Links are those with something of ours beside them.
	Links []network.LinkID `json:"links,omitempty"`
}

// checkNetwork refuses a network namespace that a machine must not have, before
// anything is touched.
func checkNetwork(spec *specs.Spec) error {
	path := netnsOf(spec)
	if path == "" {
		return nil
	}
	host, err := network.IsHost(path)
	if err != nil {
		return fmt.Errorf("network namespace: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if host {
		return fmt.Errorf("network namespace %q is the host's: %w", path, errHostNetwork)
	}
	return nil
}

// netnsOf is the path of the network namespace that a container is to join;
// empty: it gets a new one.
func netnsOf(spec *specs.Spec) string {
	if spec == nil || spec.Linux == nil {
		return ""
	}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path
		}
	}
	return ""
}

// errHostNetwork says what to do instead.
var errHostNetwork = fmt.Errorf(
	"a machine cannot use the host's network: give it one of its own (a CNI network, 'nerdctl run --net bridge', 'ctr run --cni') and publish its ports: %w",
	errdefs.ErrInvalidArgument)

// A podNetwork is the network of a sandbox. Whoever has the turn may use it.
type podNetwork struct {
	s    *Sandbox
	turn chan struct{}
	ends chan struct{} // closed when nothing is to be followed any more
	once sync.Once     // closes ends

	ns        *network.Namespace // nil: not joined
	undo      cleanup.Stack      // of joining
	cards     []*card
	routes    *protocol.Routes       // that the guest has
	neighs    *protocol.ARPNeighbors // that the guest was told
	told      bool                   // the guest was told everything once
	forwarded bool                   // ports are, or cannot be
	leftOut   []string               // what was warned of
}

// A card is a link that the machine has.
type card struct {
	network.Endpoint
	path string // where the guest finds it
	told bool   // of Endpoint.Interface
}

func (c *card) id() string { return strconv.Itoa(c.Index) }

func newPodNetwork(s *Sandbox) *podNetwork {
	return &podNetwork{s: s, turn: make(chan struct{}, 1), ends: make(chan struct{})}
}

// alone calls f while nobody else uses the network.
func (n *podNetwork) alone(ctx context.Context, f func() error) error {
	select {
	case n.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-n.turn }()
	return f()
}

// join makes a namespace the sandbox's and plugs a card for each of its
// interfaces, as soon as the machine runs. Containers that come later must name
// the same one, or none: then they have this one in the guest all the same.
func (n *podNetwork) join(ctx context.Context, path string, named bool) error {
	if n.config().Model == network.None {
		return nil
	}
	err := n.alone(ctx, func() error {
		if n.ns != nil {
			if !named {
				return nil
			}
			return n.sameAs(path)
		}
		if err := n.enter(path); err != nil {
			return err
		}
		if err := n.begin(ctx); err != nil {
			return errors.Join(err, n.leave())
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("join network: %w", err)
	}
	return nil
}

// begin gives the machine its first cards.
func (n *podNetwork) begin(ctx context.Context) error {
	if err := await(ctx, n.s.running); err != nil {
		return err
	}
	plan, err := n.plan(ctx)
	if err != nil {
		return err
	}
	return n.plug(ctx, plan)
}

func (n *podNetwork) sameAs(path string) error {
	id, err := network.Identify(path)
	if err == nil && id != n.ns.ID() {
		err = fmt.Errorf("containers of a machine share one network namespace, and %q is another: %w", path, errdefs.ErrInvalidArgument)
	}
	return err
}

// enter opens the namespace, for this sandbox alone.
func (n *podNetwork) enter(path string) error {
	ns, err := network.Open(path)
	if err != nil {
		return err
	}
	lock, err := ns.Lock()
	if err != nil {
		return errors.Join(n.s.holder(err), ns.Close())
	}
	n.ns = ns
	n.undo.Add(ns.Close)
	n.undo.Add(lock.Close)
	n.undo.Add(func() error { return n.s.state.update(func(st *State) { st.Network = nil }) })
	return n.s.state.update(func(st *State) { st.Network = &NetworkState{Path: path, ID: ns.ID(), Model: n.config().Model} })
}

// holder names the sandbox whose process has a namespace.
func (s *Sandbox) holder(err error) error {
	var taken *network.TakenError
	if !errors.As(err, &taken) {
		return err
	}
	dirs, _ := Dirs(filepath.Dir(s.opts.Dir))
	for _, dir := range dirs {
		if st, _ := ReadState(dir); st != nil && st.Shim.PID == taken.PID && dir != s.opts.Dir {
			return fmt.Errorf("sandbox %q has the network namespace in its machine, and cannot share it with another: %w", st.ID, err)
		}
	}
	return err
}

// leave gives the namespace back as it was.
func (n *podNetwork) leave() error {
	if n.ns == nil {
		return nil
	}
	err := errors.Join(n.ns.Detach(n.config().Model, n.links()...), n.undo.Run())
	n.ns, n.cards, n.routes, n.neighs, n.told, n.forwarded = nil, nil, nil, nil, false, false
	return err
}

// close leaves the namespace when the machine is gone, or about to be.
func (n *podNetwork) close() error {
	n.once.Do(func() { close(n.ends) }) // whoever follows gives the turn back
	n.turn <- struct{}{}
	defer func() { <-n.turn }()
	return n.leave()
}

// plug makes the machine's cards those of the plan.
func (n *podNetwork) plug(ctx context.Context, plan *network.Plan) error {
	var errs []error
	for _, c := range slices.Clone(n.cards) {
		if !slices.ContainsFunc(plan.Endpoints, func(e network.Endpoint) bool { return e.Index == c.Index }) {
			errs = append(errs, n.remove(ctx, c))
		}
	}
	for _, e := range plan.Endpoints {
		i := slices.IndexFunc(n.cards, func(c *card) bool { return c.Index == e.Index })
		if i < 0 {
			errs = append(errs, n.add(ctx, e))
			continue
		}
		c := n.cards[i]
		c.told = c.told && proto.Equal(c.Interface, e.Interface)
		c.Endpoint = e
	}
	return errors.Join(errs...)
}

// plan looks at the namespace.
func (n *podNetwork) plan(ctx context.Context) (*network.Plan, error) {
	snapshot, err := n.ns.Scan()
	if err != nil {
		return nil, fmt.Errorf("scan network namespace: %w", err)
	}
	plan := network.NewPlan(snapshot)
	if !slices.Equal(plan.LeftOut, n.leftOut) && len(plan.LeftOut) > 0 {
		log.G(ctx).WithField("left_out", plan.LeftOut).Warn("the guest does not get all of the network namespace")
	}
	n.leftOut = plan.LeftOut
	return plan, nil
}

// add plugs a card. It is recorded before anything is made.
func (n *podNetwork) add(ctx context.Context, e network.Endpoint) (err error) {
	c := &card{Endpoint: e}
	n.cards = append(n.cards, c)
	var undo cleanup.Stack
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.Run())
		}
	}()
	undo.Add(func() error { return n.forget(c) })
	if err := n.record(); err != nil {
		return err
	}
	a, err := n.ns.Attach(e.LinkID, n.s.opts.ID, n.queues(), n.config())
	if err != nil {
		return err
	}
	undo.Add(func() error { return n.ns.Detach(n.config().Model, c.LinkID) })
	// The machine has its own descriptors then: the tap goes with it.
	defer func() { err = errors.Join(err, a.Close()) }()
	c.path, err = n.s.machine.PlugNIC(ctx, hypervisor.NIC{ID: c.id(), MAC: e.MAC, MTU: e.MTU}, a.Taps, a.Vhost)
	return err
}

// queues is one pair for each CPU that the machine started with.
func (n *podNetwork) queues() int { return max(1, n.s.state.snapshot().VCPUs) }

func (n *podNetwork) config() network.Config { return n.s.opts.Config.Network }

// remove unplugs a card whose link is gone, or down.
func (n *podNetwork) remove(ctx context.Context, c *card) error {
	if err := n.s.machine.UnplugNIC(ctx, c.id()); err != nil {
		return err
	}
	return errors.Join(n.ns.Detach(n.config().Model, c.LinkID), n.forget(c))
}

func (n *podNetwork) forget(c *card) error {
	n.cards = slices.DeleteFunc(n.cards, func(o *card) bool { return o == c })
	return n.record()
}

// links are those with something of ours beside them.
func (n *podNetwork) links() (links []network.LinkID) {
	for _, c := range n.cards {
		links = append(links, c.LinkID)
	}
	return links
}

func (n *podNetwork) record() error {
	links := n.links()
	return n.s.state.update(func(st *State) {
		if st.Network != nil {
			now := *st.Network
			now.Links = links
			st.Network = &now
		}
	})
}

// configure tells the guest what its cards are to be, and begins to follow the
// namespace. The guest has the sandbox.
func (n *podNetwork) configure(ctx context.Context) error {
	err := n.alone(ctx, func() error {
		if n.ns == nil || n.told {
			return nil
		}
		plan, err := n.plan(ctx)
		if err != nil {
			return err
		}
		if err := n.tell(ctx, plan); err != nil {
			return err
		}
		n.told = true
		return n.follow(ctx)
	})
	if err != nil {
		return fmt.Errorf("configure network: %w", err)
	}
	return nil
}

// tell says what of the plan the guest does not know yet.
func (n *podNetwork) tell(ctx context.Context, plan *network.Plan) error {
	for _, c := range n.cards {
		if c.told {
			continue
		}
		if err := n.tellInterface(ctx, c); err != nil {
			return err
		}
		// The kernel drops routes of an interface that was down meanwhile.
		c.told, n.routes = true, nil
	}
	names := map[string]bool{}
	for _, c := range n.cards {
		names[c.Name] = true
	}
	routes, neighs := &protocol.Routes{}, &protocol.ARPNeighbors{}
	for _, r := range plan.Routes {
		if names[r.GetDevice()] {
			routes.Routes = append(routes.Routes, r)
		}
	}
	for _, e := range plan.Neighbors {
		if names[e.GetDevice()] {
			neighs.ARPNeighbors = append(neighs.ARPNeighbors, e)
		}
	}
	if len(names) > 0 && !proto.Equal(routes, n.routes) {
		if _, err := n.s.agent.UpdateRoutes(ctx, routes.Routes); err != nil {
			return n.s.because(err)
		}
		n.routes = routes
	}
	if len(names) > 0 && !n.forwarded {
		n.forwarded = true
		n.forward(ctx)
	}
	if !proto.Equal(neighs, n.neighs) {
		if all := slices.Concat(forgotten(n.neighs, neighs, names), neighs.ARPNeighbors); len(all) > 0 {
			if err := n.s.agent.AddARPNeighbors(ctx, all); err != nil {
				return n.s.because(err)
			}
		}
		n.neighs = neighs
	}
	return nil
}

// forgotten has the guest forget the neighbours that are no more, of the devices
// that are. The protocol has entries added only: one that failed is none to the
// kernel, which finds the neighbour by itself or drops the entry.
func forgotten(told, now *protocol.ARPNeighbors, names map[string]bool) (gone []*types.ARPNeighbor) {
	for _, old := range told.GetARPNeighbors() {
		stays := slices.ContainsFunc(now.GetARPNeighbors(), func(e *types.ARPNeighbor) bool {
			return e.GetDevice() == old.GetDevice() && proto.Equal(e.GetToIPAddress(), old.GetToIPAddress())
		})
		if names[old.GetDevice()] && !stays {
			failed := proto.CloneOf(old)
			failed.State = unix.NUD_FAILED
			gone = append(gone, failed)
		}
	}
	return gone
}

// cardTimeout is how long a guest may take to find a card: one that is emulated,
// on a busy host, needs more than its agent waits for.
const cardTimeout = 30 * time.Second

func (n *podNetwork) tellInterface(ctx context.Context, c *card) error {
	ctx, cancel := context.WithTimeout(ctx, cardTimeout)
	defer cancel()
	want := proto.CloneOf(c.Interface)
	want.DevicePath = c.path
	err := untilFound(ctx, func() error {
		_, err := n.s.agent.UpdateInterface(ctx, want)
		return err
	})
	if err != nil {
		return n.s.because(err)
	}
	return nil
}

// Our agent waits for a device before it says that there is none; another may
// say so at once.
const minSearch, maxSearch = 10 * time.Millisecond, time.Second

// untilFound asks again while the guest does not find what is asked for.
func untilFound(ctx context.Context, ask func() error) error {
	for pause := minSearch; ; pause = min(2*pause, maxSearch) {
		err := ask()
		if !errdefs.IsNotFound(err) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

// life is a context that ends with the sandbox's network.
func (n *podNetwork) life(ctx context.Context) context.Context {
	ctx, end := context.WithCancel(context.WithoutCancel(ctx))
	n.s.jobs.Go(func() {
		<-n.ends
		end()
	})
	return ctx
}

// follow begins to keep the guest's network as the namespace is.
func (n *podNetwork) follow(ctx context.Context) error {
	life := n.life(ctx)
	changes, err := n.ns.Watch(life)
	if err != nil {
		return err
	}
	n.s.jobs.Go(func() {
		var again <-chan time.Time
		for delay := minRetry; ; {
			select {
			case _, open := <-changes:
				if !open {
					return
				}
			case <-again:
			}
			again = nil
			err := n.alone(life, func() error { return n.renew(life) })
			switch {
			case err == nil:
				delay = minRetry
			case life.Err() == nil && n.s.alive() == nil:
				log.G(life).WithError(err).Warn("the guest's network is not what the namespace is")
				again = time.After(delay)
				delay = min(2*delay, maxRetry)
			}
		}
	})
	return nil
}

// What failed is tried again after that, if nothing changes before: a guest that
// is busy may need more than one request to let a card go.
const minRetry, maxRetry = 2 * time.Second, time.Minute

// renew makes the guest's network what the namespace is.
func (n *podNetwork) renew(ctx context.Context) error {
	if n.ns == nil {
		return nil
	}
	plan, err := n.plan(ctx)
	if err != nil {
		return err
	}
	return errors.Join(n.plug(ctx, plan), n.tell(ctx, plan))
}

// reapNetwork finds the network of a sandbox whose processes are about to be
// killed; nil: it is gone, or there was none. Others can have the namespace
// open for longer than its path, or its processes, lead to it.
func reapNetwork(ctx context.Context, st *State) *network.Namespace {
	if st.Network == nil || len(st.Network.Links) == 0 {
		return nil
	}
	paths := []string{st.Network.Path}
	for _, c := range st.Containers {
		paths = append(paths, fmt.Sprintf("/proc/%d/ns/net", c.Task.PID))
	}
	for _, path := range paths {
		if id, err := network.Identify(path); err != nil || id != st.Network.ID {
			continue
		}
		ns, err := network.Open(path)
		if err == nil {
			return ns
		}
		if !errors.Is(err, os.ErrNotExist) {
			log.G(ctx).WithError(err).Warn("network is not cleaned up")
		}
	}
	return nil
}
