package qemu

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A cpuSlot is a place for a CPU (HotpluggableCPU in qapi/machine.json).
type cpuSlot struct {
	Type  string
	Props struct {
		Socket *int `json:"socket-id,omitempty"`
		Die    *int `json:"die-id,omitempty"`
		Core   *int `json:"core-id,omitempty"`
		Thread *int `json:"thread-id,omitempty"`
	}
	QOMPath string `json:"qom-path"` // empty when there is no CPU in it
}

// cpuUnplugVersion is the first QEMU that survives the removal of a CPU: 7.2
// corrupts its memory and dies at a later hotplug; 8 and 9 were not tried.
const cpuUnplugVersion = 10

// ResizeCPUs plugs CPUs, or removes some that were plugged, until there are n,
// and returns how many there are, also with an error. The guest takes new ones
// into use (OnlineCPUMem). Where QEMU can't remove any the class of the error is
// ErrFailedPrecondition, and the guest may set them offline instead.
func (vm *VM) ResizeCPUs(ctx context.Context, n int) (now int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("resize to %d cpus: %w", n, err)
		}
	}()
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	if err := vm.cpuTurn.take(ctx); err != nil {
		return 0, err
	}
	defer vm.cpuTurn.give()
	places, now, err := vm.cpuSlots(ctx)
	switch {
	case err != nil:
		return 0, err
	case n < vm.spec.VCPUs:
		return now, fmt.Errorf("fewer than the %d of boot: %w", vm.spec.VCPUs, errdefs.ErrInvalidArgument)
	case n > len(places):
		return now, fmt.Errorf("more than %d: %w", len(places), errdefs.ErrResourceExhausted)
	case n < now:
		return vm.removeCPUs(ctx, now, n)
	}
	for i, place := range places {
		if now == n {
			break
		}
		if place.QOMPath != "" {
			continue
		}
		what := hypervisor.Plugged{Kind: hypervisor.KindCPU, ID: strconv.Itoa(i)}
		if _, err := vm.plug(ctx, what, slots{"cpu", i, i}, func(p *plug) []step { return []step{vm.cpu(p, place)} }); err != nil {
			return now, err
		}
		now++
	}
	return now, nil
}

// removeCPUs takes the last ones first.
func (vm *VM) removeCPUs(ctx context.Context, now, n int) (int, error) {
	if err := vm.cpuRemovable(); err != nil {
		return now, err
	}
	for _, p := range slices.Backward(vm.plugs.list()) {
		if now == n {
			break
		}
		if p.Kind != hypervisor.KindCPU {
			continue
		}
		if err := vm.unplug(ctx, p.ID, hypervisor.KindCPU); err != nil {
			return now, fmt.Errorf("cpu %s: %w", p.ID, err)
		}
		now--
	}
	return now, nil
}

func (vm *VM) cpuRemovable() error {
	if v := vm.qmp.Version(); v.Major < cpuUnplugVersion {
		return fmt.Errorf("qemu %s is corrupted by the removal of a cpu, the guest can set it offline: %w", v, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// cpu is the one step of a CPU.
func (vm *VM) cpu(p *plug, place cpuSlot) step {
	args := properties{}
	for name, id := range map[string]*int{
		"socket-id": place.Props.Socket, "die-id": place.Props.Die, "core-id": place.Props.Core, "thread-id": place.Props.Thread,
	} {
		if id != nil {
			args[name] = *id
		}
	}
	device := vm.device(p, place.Type, args)
	return step{device.do, func(ctx context.Context) error {
		if err := vm.cpuRemovable(); err != nil {
			// Not even one that may not be there is removed.
			places, _, qerr := vm.cpuSlots(ctx)
			if qerr == nil && places[p.Slot].QOMPath == "" {
				return nil
			}
			return cmp.Or(qerr, err)
		}
		return device.undo(ctx)
	}}
}

// cpuSlots are the places in their order, and how many have a CPU.
func (vm *VM) cpuSlots(ctx context.Context) (places []cpuSlot, present int, err error) {
	if err := vm.qmp.Execute(ctx, "query-hotpluggable-cpus", nil, &places); err != nil {
		return nil, 0, err
	}
	slices.SortStableFunc(places, func(a, b cpuSlot) int {
		order := func(a, b *int) int {
			if a == nil || b == nil {
				return 0
			}
			return cmp.Compare(*a, *b)
		}
		return cmp.Or(order(a.Props.Socket, b.Props.Socket), order(a.Props.Die, b.Props.Die),
			order(a.Props.Core, b.Props.Core), order(a.Props.Thread, b.Props.Thread))
	})
	for _, p := range places {
		if p.QOMPath != "" {
			present++
		}
	}
	if len(places) != vm.spec.MaxVCPUs {
		return nil, 0, fmt.Errorf("qemu has %d places for cpus: %w", len(places), errdefs.ErrNotImplemented)
	}
	return places, present, nil
}
