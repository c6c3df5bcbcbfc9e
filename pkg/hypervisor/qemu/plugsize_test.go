package qemu

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp/qmptest"
)

// cpus answers that so many of the eight places have a CPU. QEMU lists the last
// one first.
func cpus(present int) qmptest.Step {
	var list []any
	for i := 7; i >= 0; i-- {
		place := map[string]any{"type": "max-x86_64-cpu", "vcpus-count": 1, "props": map[string]int{"socket-id": 0, "core-id": i, "thread-id": 0}}
		if i < present {
			place["qom-path"] = fmt.Sprintf("/machine/unattached/device[%d]", i)
		}
		list = append(list, place)
	}
	return qmptest.Steps(qmptest.Expect("query-hotpluggable-cpus"), qmptest.Return(list))
}

func addCPU(n int) qmptest.Step {
	return ask("device_add", fmt.Sprintf(`{"core-id":%d,"driver":"max-x86_64-cpu","id":"cpu-%[1]d","socket-id":0,"thread-id":0}`, n))
}

func TestResizeCPUs(t *testing.T) {
	vm := scripted(t, cpus(1), addCPU(1), addCPU(2), cpus(3), cpus(3), cpus(3), cpus(3))
	if n, err := vm.ResizeCPUs(within(t), 3); n != 3 || err != nil {
		t.Fatalf("%d cpus, %v", n, err)
	}
	wantPlugged(t, vm, hypervisor.Plugged{Kind: hypervisor.KindCPU, ID: "1", Slot: 1}, hypervisor.Plugged{Kind: hypervisor.KindCPU, ID: "2", Slot: 2})
	if n, err := vm.ResizeCPUs(within(t), 3); n != 3 || err != nil {
		t.Errorf("%d cpus, %v", n, err)
	}
	n, err := vm.ResizeCPUs(within(t), 9)
	wantError(t, err, errdefs.ErrResourceExhausted, "resize to 9 cpus: more than 8")
	if n != 3 {
		t.Errorf("%d cpus", n)
	}
	_, err = vm.ResizeCPUs(within(t), 0)
	wantError(t, err, errdefs.ErrInvalidArgument, "fewer than the 1 of boot")
	// Not a word of it goes to a QEMU that would not survive it.
	n, err = vm.ResizeCPUs(within(t), 1)
	wantError(t, err, errdefs.ErrFailedPrecondition, "qemu 7.2.22 is corrupted by the removal of a cpu")
	if n != 3 {
		t.Errorf("%d cpus", n)
	}
}

func TestRemoveCPUs(t *testing.T) {
	ost := qmptest.Event("ACPI_DEVICE_OST", map[string]any{"info": map[string]any{"device": "cpu-1", "slot": "1", "slot-type": "CPU", "source": 3, "status": 1}})
	vm := scriptedAs(t, qmptest.Steps(qmptest.Greet(10, 0, 3), qmptest.Expect("qmp_capabilities"), qmptest.Return(nil)),
		cpus(1), addCPU(1), addCPU(2),
		cpus(3), ask("device_del", `{"id":"cpu-2"}`), deleted("cpu-2"), ask("device_del", `{"id":"cpu-1"}`), ost)
	if n, err := vm.ResizeCPUs(within(t), 3); n != 3 || err != nil {
		t.Fatalf("%d cpus, %v", n, err)
	}
	n, err := vm.ResizeCPUs(within(t), 1)
	wantError(t, err, errdefs.ErrFailedPrecondition, "resize to 1 cpus: cpu 1: guest keeps it")
	if n != 2 {
		t.Errorf("%d cpus", n)
	}
}

// A CPU that QEMU refuses is forgotten; one that may be there is not removed
// from a QEMU that would not survive it.
func TestResizeCPUsFails(t *testing.T) {
	vm := scripted(t, cpus(1), refuse("device_add"), cpus(1))
	_, err := vm.ResizeCPUs(within(t), 2)
	wantError(t, err, nil, "no such luck")
	wantPlugged(t, vm)

	ctx, cancel := context.WithCancel(within(t))
	vm = scripted(t, cpus(1), qmptest.Expect("device_add"), qmptest.Do(cancel), cpus(2))
	n, err := vm.ResizeCPUs(ctx, 2)
	wantError(t, err, context.Canceled, "corrupted")
	if len(vm.Plugged()) != 1 || n != 1 {
		t.Errorf("plugged %v, %d cpus", vm.Plugged(), n)
	}

	vm = scripted(t, qmptest.Expect("query-hotpluggable-cpus"), qmptest.Return([]any{}))
	_, err = vm.ResizeCPUs(within(t), 2)
	wantError(t, err, errdefs.ErrNotImplemented, "0 places")
}

// has answers that virtio-mem has so many MiB.
func has(n int) qmptest.Step {
	return qmptest.Steps(qmptest.Expect("query-memory-devices"), qmptest.Return([]any{
		map[string]any{"type": "virtio-mem", "data": map[string]any{"id": "hotmem0", "memaddr": 4 << 30, "requested-size": 0, "size": n << 20}},
	}))
}

func request(n int) qmptest.Step {
	return ask("qom-set", fmt.Sprintf(`{"path":"/machine/peripheral/hotmem0","property":"requested-size","value":%d}`, n<<20))
}

func virtioMemHas(n int) qmptest.Step {
	return qmptest.Steps(qmptest.Expect("qom-get", `{"path":"/machine/peripheral/hotmem0","property":"size"}`), qmptest.Return(n<<20))
}

func TestResizeMemory(t *testing.T) {
	changed := qmptest.Event("MEMORY_DEVICE_SIZE_CHANGE", map[string]any{"id": "hotmem0", "size": 1, "qom-path": "/"})
	vm := scripted(t,
		has(0), request(512), virtioMemHas(0), changed, virtioMemHas(256), changed, virtioMemHas(512), has(512),
		has(512), request(16), virtioMemHas(512), virtioMemHas(512), virtioMemHas(16), has(16), // the events are lost
		has(16), has(16), has(16))
	m, err := vm.ResizeMemory(within(t), 768)
	if diff := cmp.Diff(hypervisor.Memory{MiB: 768}, m); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	if m, err := vm.ResizeMemory(within(t), 256+15); m.MiB != 256+16 || err != nil {
		t.Errorf("%+v, %v", m, err)
	}
	m, err = vm.ResizeMemory(within(t), 4098)
	wantError(t, err, errdefs.ErrResourceExhausted, "more than 4096 MiB")
	if m.MiB != 272 {
		t.Errorf("%+v", m)
	}
	_, err = vm.ResizeMemory(within(t), 255)
	wantError(t, err, errdefs.ErrInvalidArgument, "less than the 256 MiB of boot")
	if m, err := vm.Memory(within(t)); m.MiB != 272 || err != nil {
		t.Errorf("%+v, %v", m, err)
	}
}

// A guest that stops half-way is told to stay there, and the caller how far it got.
func TestResizeMemoryStuck(t *testing.T) {
	ctx, cancel := context.WithCancel(within(t))
	vm := scripted(t, has(0), request(512), virtioMemHas(100), qmptest.Do(cancel), virtioMemHas(104), request(104), has(104))
	m, err := vm.ResizeMemory(ctx, 768)
	wantError(t, err, context.Canceled, "resize memory to 768 MiB: guest is at 104 of 512 MiB")
	if m.MiB != 360 {
		t.Errorf("%+v", m)
	}
}

func TestResizeMemoryFixed(t *testing.T) {
	none := qmptest.Steps(qmptest.Expect("query-memory-devices"), qmptest.Return([]any{}))
	vm := scripted(t, none, none)
	vm.spec.MaxMemoryMiB = vm.spec.MemoryMiB
	if m, err := vm.ResizeMemory(within(t), 256); m.MiB != 256 || err != nil {
		t.Errorf("%+v, %v", m, err)
	}
	_, err := vm.ResizeMemory(within(t), 257)
	wantError(t, err, errdefs.ErrResourceExhausted, "more than 256 MiB")
}

func TestResizeMemoryByModules(t *testing.T) {
	modules := func(mib ...int) qmptest.Step {
		var list []any
		for i, n := range mib {
			list = append(list, map[string]any{"type": "dimm", "data": map[string]any{"id": fmt.Sprintf("memory-%d", i), "addr": (4 + i) << 30, "size": n << 20, "slot": i}})
		}
		return qmptest.Steps(qmptest.Expect("query-memory-devices"), qmptest.Return(list))
	}
	add := func(slot, mib int) qmptest.Step {
		return qmptest.Steps(
			ask("object-add", fmt.Sprintf(`{"id":"backend-memory-%d","qom-type":"memory-backend-memfd","share":true,"size":%d}`, slot, mib<<20)),
			ask("device_add", fmt.Sprintf(`{"driver":"pc-dimm","id":"memory-%d","memdev":"backend-memory-%[1]d","slot":%[1]d}`, slot)))
	}
	del := func(slot int) qmptest.Step {
		name := fmt.Sprintf("memory-%d", slot)
		return qmptest.Steps(ask("device_del", fmt.Sprintf(`{"id":%q}`, name)), deleted(name), ask("object-del", fmt.Sprintf(`{"id":"backend-%s"}`, name)))
	}
	busy := qmptest.Event("ACPI_DEVICE_OST", map[string]any{"info": map[string]any{"device": "memory-0", "slot": "0", "slot-type": "DIMM", "source": 3, "status": 1}})
	vm := scripted(t,
		modules(), add(0, 512), modules(512),
		modules(512), add(1, 128), modules(512, 128),
		modules(512, 128), modules(512, 128), // no slot left
		modules(512, 128), del(1), modules(512), // 512 MiB are more than what is to go
		modules(512), ask("device_del", `{"id":"memory-0"}`), busy, modules(512))
	vm.spec.MemorySlots = 2
	m, err := vm.ResizeMemory(within(t), 256+512)
	if diff := cmp.Diff(hypervisor.Memory{MiB: 768, Modules: []hypervisor.MemoryModule{{Address: 4 << 30, MiB: 512}}}, m); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	if m, err := vm.ResizeMemory(within(t), 768+1); m.MiB != 896 || err != nil {
		t.Errorf("%+v, %v", m, err)
	}
	_, err = vm.ResizeMemory(within(t), 1000)
	wantError(t, err, errdefs.ErrResourceExhausted, "no memory slot left of 2")
	if m, err := vm.ResizeMemory(within(t), 500); m.MiB != 768 || err != nil {
		t.Errorf("%+v, %v", m, err)
	}
	m, err = vm.ResizeMemory(within(t), 256)
	wantError(t, err, errdefs.ErrFailedPrecondition, "memory module 0 of 512 MiB: guest keeps it")
	if m.MiB != 768 {
		t.Errorf("%+v", m)
	}
	wantPlugged(t, vm, hypervisor.Plugged{Kind: hypervisor.KindMemory, ID: "0", MiB: 512})
}

// A call waits for its turn no longer than it may.
func TestTurn(t *testing.T) {
	turn := newTurn()
	if err := turn.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := turn.take(ctx); err == nil {
		t.Error("took the turn of another")
	}
	turn.give()
	if err := turn.take(within(t)); err != nil {
		t.Error(err)
	}
}
