package qemu

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

const mib = 1 << 20

// moduleMiB is what the size of a memory module is a multiple of: the least
// that Linux adds (SECTION_SIZE_BITS is 27 on x86, and on arm64 with pages of 4
// KiB). A guest with larger blocks refuses it.
const moduleMiB = 128

// ResizeMemory grows or shrinks the machine's memory to mib, rounded up, and
// returns what there is, also with an error: a guest that does not follow within
// the context's time stays where it got to.
//
// Through virtio-mem the guest uses what it got by itself. Modules
// (Spec.MemorySlots) may have to be found (MemHotplugByProbe) and set online
// (OnlineCPUMem), movable, or else they are not given back; whole ones are.
func (vm *VM) ResizeMemory(ctx context.Context, size int) (now hypervisor.Memory, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("resize memory to %d MiB: %w", size, err)
		}
	}()
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return now, err
	}
	defer end()
	if err := vm.memoryTurn.take(ctx); err != nil {
		return now, err
	}
	defer vm.memoryTurn.give()
	if now, err = vm.memory(ctx); err != nil {
		return now, err
	}
	switch {
	case size < vm.spec.MemoryMiB:
		return now, fmt.Errorf("less than the %d MiB of boot: %w", vm.spec.MemoryMiB, errdefs.ErrInvalidArgument)
	case size > vm.spec.MemoryMiB+hotplugMiB(vm.spec):
		return now, fmt.Errorf("more than %d MiB: %w", vm.spec.MemoryMiB+hotplugMiB(vm.spec), errdefs.ErrResourceExhausted)
	case hotplugMiB(vm.spec) == 0:
		return now, nil
	case vm.spec.MemorySlots == 0:
		err = vm.resizeVirtioMem(ctx, size-vm.spec.MemoryMiB)
	case size > now.MiB:
		err = vm.plugModule(ctx, roundUp(size-now.MiB, moduleMiB))
	default:
		err = vm.unplugModules(ctx, now.MiB-size)
	}
	if err != nil {
		var cancel context.CancelFunc
		ctx, cancel = vm.undoing(ctx)
		defer cancel()
	}
	if after, merr := vm.memory(ctx); merr == nil {
		now = after
	} else if err == nil {
		err = merr
	}
	return now, err
}

// Memory is how much memory the machine has now.
func (vm *VM) Memory(ctx context.Context) (hypervisor.Memory, error) {
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return hypervisor.Memory{}, err
	}
	defer end()
	m, err := vm.memory(ctx)
	if err != nil {
		return m, fmt.Errorf("look at memory: %w", err)
	}
	return m, nil
}

// A memoryDevice is what QEMU says of one (MemoryDeviceInfo in qapi/machine.json).
type memoryDevice struct {
	Type string
	Data struct {
		ID   string
		Addr uint64
		Size int64
	}
}

func (vm *VM) memory(ctx context.Context) (hypervisor.Memory, error) {
	m := hypervisor.Memory{MiB: vm.spec.MemoryMiB}
	var devices []memoryDevice
	if err := vm.qmp.Execute(ctx, "query-memory-devices", nil, &devices); err != nil {
		return m, err
	}
	for _, d := range devices {
		size := int(d.Data.Size / mib)
		m.MiB += size
		if d.Type == "dimm" {
			m.Modules = append(m.Modules, hypervisor.MemoryModule{Address: d.Data.Addr, MiB: size})
		}
	}
	return m, nil
}

// QEMU sends an event on the size of memory at most once a second: after the
// first one, growing intervals pass between looks at how far a guest got.
const (
	lookFirst = 10 * time.Millisecond
	lookLast  = time.Second
)

// resizeVirtioMem asks the guest for a size of its virtio-mem device, and waits
// until it is that.
func (vm *VM) resizeVirtioMem(ctx context.Context, size int) error {
	want := int64(roundUp(size, memoryBlockMiB)) * mib
	if err := vm.requestMemory(ctx, want); err != nil {
		return err
	}
	for pause := lookFirst; ; pause = min(2*pause, lookLast) {
		has, err := vm.virtioMemSize(ctx)
		switch {
		case err == nil && has == want:
			return nil
		case err != nil && ctx.Err() == nil:
			return err
		}
		select {
		case <-vm.resized:
		case <-time.After(pause):
		case <-ctx.Done():
			return vm.settleMemory(ctx, want)
		}
	}
}

// settleMemory has a guest that took too long stay where it is, so that what is
// reported holds.
func (vm *VM) settleMemory(call context.Context, want int64) error {
	ctx, cancel := vm.undoing(call)
	defer cancel()
	has, err := vm.virtioMemSize(ctx)
	if err == nil {
		err = vm.requestMemory(ctx, has)
	}
	if err != nil {
		return fmt.Errorf("wait for guest: %w; undo: %w", context.Cause(call), err)
	}
	return fmt.Errorf("guest is at %d of %d MiB: %w", has/mib, want/mib, context.Cause(call))
}

const virtioMemPath = "/machine/peripheral/" + virtioMem

func (vm *VM) requestMemory(ctx context.Context, size int64) error {
	return vm.qmp.Execute(ctx, "qom-set", properties{"path": virtioMemPath, "property": "requested-size", "value": size}, nil)
}

func (vm *VM) virtioMemSize(ctx context.Context) (size int64, err error) {
	err = vm.qmp.Execute(ctx, "qom-get", properties{"path": virtioMemPath, "property": "size"}, &size)
	return size, err
}

func (vm *VM) plugModule(ctx context.Context, size int) error {
	what := hypervisor.Plugged{Kind: hypervisor.KindMemory, MiB: size}
	from := slots{"memory slot", 0, vm.spec.MemorySlots - 1}
	_, err := vm.plug(ctx, what, from, func(p *plug) []step {
		return []step{
			{
				func(ctx context.Context) error {
					return vm.qmp.Execute(ctx, "object-add", properties{
						"qom-type": "memory-backend-memfd", "id": p.backend(), "size": int64(size) * mib, "share": true,
					}, nil)
				},
				func(ctx context.Context) error {
					return vm.qmp.Execute(ctx, "object-del", properties{"id": p.backend()}, nil)
				},
			},
			vm.device(p, "pc-dimm", properties{"memdev": p.backend(), "slot": p.Slot}),
		}
	})
	return err
}

// unplugModules removes modules that are not more than so much, last ones first.
func (vm *VM) unplugModules(ctx context.Context, size int) error {
	for _, p := range slices.Backward(vm.plugs.list()) {
		if p.Kind != hypervisor.KindMemory || p.MiB > size {
			continue
		}
		if err := vm.unplug(ctx, p.ID, hypervisor.KindMemory); err != nil {
			return fmt.Errorf("memory module %s of %d MiB: %w", p.ID, p.MiB, err)
		}
		size -= p.MiB
	}
	return nil
}

func roundUp(n, to int) int { return (n + to - 1) / to * to }
