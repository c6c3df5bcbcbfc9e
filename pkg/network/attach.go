package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/cleanup"
)

// aliasPrefix begins the alias of every tap of ours; the sandbox's id follows.
const aliasPrefix = "vmshim:"

// maxAlias is what the kernel takes: IFALIASZ, with the zero at its end.
const maxAlias = 255

// An Attachment is what a machine has a link's frames by.
type Attachment struct {
	Taps  []*os.File // a pair of queues each
	Vhost []*os.File // as many, or none
}

// Close closes the caller's descriptors. The machine has its own.
func (a *Attachment) Close() error { return closeAll(append(a.Taps, a.Vhost...)) }

// tapName is that of the tap beside a link.
func tapName(index int) string { return fmt.Sprintf("vmshim%d", index) }

// Attach puts a tap with that many queues behind a link. It lasts as long as its
// descriptors; Detach removes what remains. On error nothing is left.
func (n *Namespace) Attach(link LinkID, owner string, queues int, cfg Config) (_ *Attachment, err error) {
	var undo cleanup.Stack
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("attach %s: %w", link.Name, err), undo.Run())
		}
	}()
	a := &Attachment{}
	undo.Add(a.Close)
	if a.Vhost, err = openVhost(cfg.Vhost, queues); err != nil {
		return nil, err
	}
	target, err := n.handle.LinkByIndex(link.Index)
	if err != nil {
		return nil, fmt.Errorf("find link: %w", err)
	}
	if cfg.Model == Macvtap {
		a.Taps, err = n.attachMacvtap(target, owner, queues, &undo)
		return a, err
	}
	if a.Taps, err = n.openTap(tapName(link.Index), queues); err != nil {
		return nil, err
	}
	tap, err := n.setTap(tapName(link.Index), owner, target.Attrs().MTU)
	if err != nil {
		return nil, err
	}
	for _, way := range [][2]netlink.Link{{target, tap}, {tap, target}} {
		if err := n.redirect(way[0], way[1], &undo); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// setTap makes a new tap what is needed, and sets it up.
func (n *Namespace) setTap(name, owner string, mtu int) (netlink.Link, error) {
	tap, err := n.handle.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find tap: %w", err)
	}
	alias := aliasPrefix + owner
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"alias", func() error { return n.handle.LinkSetAlias(tap, alias[:min(len(alias), maxAlias)]) }},
		{"mtu", func() error { return n.handle.LinkSetMTU(tap, mtu) }},
		// The host shall not be heard on it: no address, so no solicitations.
		{"address generation", func() error {
			err := n.handle.LinkSetIP6AddrGenMode(tap, nl6AddrGenNone)
			if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
				return nil // no IPv6
			}
			return err
		}},
		{"state", func() error { return n.handle.LinkSetUp(tap) }},
	} {
		if err := step.do(); err != nil {
			return nil, fmt.Errorf("set %s of tap %q: %w", step.name, name, err)
		}
	}
	return tap, nil
}

// nl6AddrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const nl6AddrGenNone = 1

// redirect sends everything that arrives at one link out of the other.
func (n *Namespace) redirect(from, to netlink.Link, undo *cleanup.Stack) error {
	name := from.Attrs().Name
	qdisc := ingress(from.Attrs().Index)
	if err := n.handle.QdiscAdd(qdisc); err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("somebody else filters what arrives there: %w", errdefs.ErrAlreadyExists)
		}
		return fmt.Errorf("add ingress qdisc to %s: %w", name, err)
	}
	undo.Add(func() error { return n.removeIngress(from.Attrs().Index) })
	// u32 without a selector matches everything; not every kernel has matchall.
	err := n.handle.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Priority: 1, Protocol: unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{&netlink.MirredAction{
			ActionAttrs:  netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN},
			MirredAction: netlink.TCA_EGRESS_REDIR, Ifindex: to.Attrs().Index,
		}},
	})
	if err != nil {
		return fmt.Errorf("redirect %s to %s: %w", name, to.Attrs().Name, err)
	}
	return nil
}

func ingress(index int) netlink.Qdisc {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
}

// removeIngress copes with a link, or qdisc, that is gone.
func (n *Namespace) removeIngress(index int) error {
	err := n.handle.QdiscDel(ingress(index))
	for _, gone := range []error{unix.ENODEV, unix.ENOENT, unix.EINVAL} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("remove ingress qdisc of link %d: %w", index, err)
	}
	return nil
}

// Detach removes what Attach made for links by the model, also when the machine, or the
// links themselves, are gone already. The links are as they were before.
func (n *Namespace) Detach(model Model, links ...LinkID) error {
	var errs []error
	for _, l := range links {
		if model != Macvtap {
			errs = append(errs, n.removeIngress(l.Index))
		}
		errs = append(errs, n.removeTap(tapName(l.Index)))
	}
	return errors.Join(errs...)
}

// removeTap copes with one that is gone, as most are with their machine.
func (n *Namespace) removeTap(name string) error {
	tap, err := n.handle.LinkByName(name)
	if err != nil {
		return nil //nolint:nilerr // gone
	}
	if err := n.handle.LinkDel(tap); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove tap %q: %w", name, err)
	}
	return nil
}
