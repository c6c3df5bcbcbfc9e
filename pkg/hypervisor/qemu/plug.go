package qemu

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
)

// Hotplug. What it builds on was decided at boot (args.go) and can't be changed
// later: the bus behind the bridge, the most CPUs and memory.
//
// A device comes by a list of steps, each with its inverse. A step that fails
// undoes itself and those before it; unplugging is the same list backwards. A
// device that could not be undone as a whole keeps its slot, and unplugging it
// goes on where it stopped.
//
// Any number of these calls may be under way. They end with their context or
// with the machine; bury joins them.

// plugTimeout bounds a call whose context has no deadline. An emulated guest
// on a busy host lets a device go within seconds.
const plugTimeout = 30 * time.Second

// undoTimeout bounds what has to be undone when the call's own time is over.
const undoTimeout = 10 * time.Second

// A step is one thing that a device needs.
type step struct {
	do   func(context.Context) error
	undo func(context.Context) error // copes with a step done by half, or not at all
}

// begin makes the context of a call on the running machine.
func (vm *VM) begin(ctx context.Context) (context.Context, func(), error) {
	if !vm.enter() {
		return nil, nil, vm.goneErr()
	}
	cancel := context.CancelFunc(func() {})
	if _, ok := ctx.Deadline(); !ok {
		ctx, cancel = context.WithTimeout(ctx, plugTimeout)
	}
	ctx, unbind := vm.bound(ctx)
	return ctx, func() {
		unbind()
		cancel()
		vm.calls.Done()
	}, nil
}

// enter counts a call, unless the machine is down.
func (vm *VM) enter() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if !vm.failed {
		vm.calls.Add(1)
	}
	return !vm.failed
}

// undoing is a context for undoing what the context of a call ended.
func (vm *VM) undoing(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	ctx, unbind := vm.bound(ctx)
	return ctx, func() {
		unbind()
		cancel()
	}
}

// plug adds a device in a slot of those. It is found again by kind and id.
func (vm *VM) plug(ctx context.Context, what hypervisor.Plugged, from slots, steps func(*plug) []step) (*plug, error) {
	p, err := vm.plugs.reserve(what, from)
	if err != nil {
		return nil, err
	}
	p.steps = steps(p)
	defer vm.plugs.settle(p)
	if err := vm.bring(ctx, p); err != nil {
		return nil, err
	}
	return p, nil
}

// bring takes the steps, or undoes them.
func (vm *VM) bring(ctx context.Context, p *plug) error {
	for _, s := range p.steps {
		p.done++
		err := s.do(ctx)
		if err == nil {
			continue
		}
		p.unsure = true
		ctx, cancel := vm.undoing(ctx)
		defer cancel()
		if uerr := vm.takeBack(ctx, p); uerr != nil {
			err = fmt.Errorf("%w; undo: %w", err, uerr)
		}
		return err
	}
	return nil
}

// takeBack undoes the steps, from where the last call for it stopped. QEMU may
// refuse to undo what it may never have done.
func (vm *VM) takeBack(ctx context.Context, p *plug) error {
	for ; p.done > 0; p.done-- {
		err := p.steps[p.done-1].undo(ctx)
		if err != nil && (!p.unsure || !refused(err)) {
			p.unsure = !refused(err)
			return err
		}
		p.unsure = false
	}
	return nil
}

// unplug removes the device of that id and of one of the kinds.
func (vm *VM) unplug(ctx context.Context, id string, kinds ...hypervisor.Kind) error {
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	p, err := vm.plugs.claim(id, kinds...)
	if err != nil {
		return err
	}
	defer vm.plugs.settle(p)
	return vm.takeBack(ctx, p)
}

// Plugged lists the devices that were added since the machine started.
func (vm *VM) Plugged() []hypervisor.Plugged { return vm.plugs.list() }

// properties are arguments of a QMP command.
type properties map[string]any

// device is the step that the guest sees.
func (vm *VM) device(p *plug, driver string, more properties) step {
	args := properties{"driver": driver, "id": p.name()}
	maps.Copy(args, more)
	return step{
		do: func(ctx context.Context) error { return vm.qmp.Execute(ctx, "device_add", args, nil) },
		undo: func(ctx context.Context) error {
			return vm.remove(ctx, p)
		},
	}
}

// pciDevice is a device on the hotplug bus.
func (vm *VM) pciDevice(p *plug, driver string, more properties) step {
	args := properties{"bus": bridge, "addr": fmt.Sprintf("%#x", p.Slot)}
	maps.Copy(args, more)
	return vm.device(p, driver, args)
}

// pciPath is how the guest's agent is told of a device: the slots of bridge and
// device in two hexadecimal digits each.
func pciPath(slot int) string { return fmt.Sprintf("%02x/%02x", bridgeSlot, slot) }

// askAgain is when a guest that did not let a device go is asked again, and
// QEMU whether it did: a guest that boots may miss the first time. QEMU takes
// no second request within 5 seconds (acpi_pcihp_device_unplug_request_cb).
const askAgain = 6 * time.Second

// remove asks the guest to let a device go, and waits until it did.
func (vm *VM) remove(ctx context.Context, p *plug) error {
	p.forget() // what it said to an earlier request
	again := time.NewTicker(vm.askAgain)
	defer again.Stop()
	for {
		select {
		case <-p.gone:
			return nil
		default:
		}
		err := vm.qmp.Execute(ctx, "device_del", properties{"id": p.name()}, nil)
		switch {
		case errdefs.IsNotFound(err):
			return nil
		case !refused(err):
			p.asked = true
		case !p.asked: // a request that is under way is refused, too
			return err
		}
		select {
		case <-p.gone:
			return nil
		case why := <-p.refused:
			return fmt.Errorf("guest keeps it: %.200q: %w", why, errdefs.ErrFailedPrecondition)
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for guest to let %s go: %w", p.name(), context.Cause(ctx))
		}
	}
}

// refused says that QEMU answered, and did nothing.
func refused(err error) bool {
	var refusal *qmp.Error
	return errors.As(err, &refusal)
}

// lent is the step of handing files to QEMU under names, which the command of
// the next step takes.
type lent struct {
	vm    *VM
	files []lentFile
	held  []string // names that were handed over and not taken
}

type lentFile struct {
	name string
	*os.File
}

func (l *lent) add(name string, f *os.File) { l.files = append(l.files, lentFile{name, f}) }

func (l *lent) step() step { return step{l.do, l.undo} }

func (l *lent) do(ctx context.Context) error {
	for _, f := range l.files {
		l.held = append(l.held, f.name)
		if err := l.vm.qmp.GetFD(ctx, f.name, f.File); err != nil {
			return err
		}
	}
	return nil
}

// takenBy is the step whose command takes the files when it succeeds.
func (l *lent) takenBy(s step) step {
	do := s.do
	s.do = func(ctx context.Context) error {
		err := do(ctx)
		if err == nil {
			l.held = nil
		}
		return err
	}
	return s
}

// undo closes what QEMU still has: a command that failed may have taken some.
func (l *lent) undo(ctx context.Context) error {
	for _, name := range l.held {
		if err := l.vm.qmp.Execute(ctx, "closefd", properties{"fdname": name}, nil); err != nil && !refused(err) {
			return err
		}
	}
	l.held = nil
	return nil
}

// A turn is taken by one at a time, for as long as a call takes.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t turn) give() { <-t }
