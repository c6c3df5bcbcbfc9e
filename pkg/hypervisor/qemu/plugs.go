package qemu

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
)

// slots are numbers for devices, from first to last.
type slots struct {
	what        string
	first, last int
}

var (
	// The bus behind the bridge: slot 0 is the bridge's own (it may have a
	// hotplug controller there), 31 the last (pci_regs.h has 5 bits for it).
	busSlots = slots{"slot for devices", 1, 31}
	// VIRTIO_SCSI_MAX_TARGET of QEMU.
	scsiTargets = slots{"scsi target", 0, 255}
)

// free is the lowest number that is not used.
func (s slots) free(used func(int) bool) (int, error) {
	for n := s.first; n <= s.last; n++ {
		if !used(n) {
			return n, nil
		}
	}
	return 0, fmt.Errorf("no %s left of %d: %w", s.what, s.last-s.first+1, errdefs.ErrResourceExhausted)
}

// A plug is a device that was, or is being, plugged.
type plug struct {
	hypervisor.Plugged
	gone    chan struct{} // closed when QEMU has removed the device
	refused chan string   // the guest's last words on removing it

	busy   bool   // guarded by plugs.mu: a call has it, and with it what follows
	steps  []step // what it takes
	done   int    // how many of them are done
	unsure bool   // whether the last of these is
	asked  bool   // the guest was asked to let it go
}

// name is QEMU's id of the device. A slot is not used again before everything
// of its last device is gone.
func (p *plug) name() string { return fmt.Sprintf("%s-%d", p.Kind, p.Slot) }

// backend is QEMU's id of what the device stands on.
func (p *plug) backend() string { return "backend-" + p.name() }

func (p *plug) forget() {
	select {
	case <-p.refused:
	default:
	}
}

// plugs are the devices of a machine by QEMU's ids.
type plugs struct {
	mu  sync.Mutex
	all map[string]*plug // guarded by mu
}

// namespace is what an id must be unique in.
func namespace(kind hypervisor.Kind) hypervisor.Kind {
	if kind == hypervisor.KindSCSIDisk {
		return hypervisor.KindDisk
	}
	return kind
}

// onBus says whether the kind takes a slot of the hotplug bus.
func onBus(kind hypervisor.Kind) bool {
	switch kind {
	case hypervisor.KindSCSIDisk, hypervisor.KindMemory, hypervisor.KindCPU:
		return false
	}
	return true
}

// reserve makes a record for a new device, in a slot of its own. It is the
// caller's until settled. What nobody else names has its slot as its id.
func (ps *plugs) reserve(what hypervisor.Plugged, from slots) (*plug, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.all {
		if p.ID == what.ID && namespace(p.Kind) == namespace(what.Kind) {
			return nil, fmt.Errorf("there is one already: %w", errdefs.ErrAlreadyExists)
		}
	}
	slot, err := from.free(func(n int) bool {
		for _, p := range ps.all {
			if p.Slot == n && (p.Kind == what.Kind || onBus(p.Kind) && onBus(what.Kind)) {
				return true
			}
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	if what.Slot = slot; what.ID == "" {
		what.ID = strconv.Itoa(slot)
	}
	p := &plug{Plugged: what, gone: make(chan struct{}), refused: make(chan string, 1), busy: true}
	if ps.all == nil {
		ps.all = map[string]*plug{}
	}
	ps.all[p.name()] = p
	return p, nil
}

// claim finds a device and makes it the caller's until settled.
func (ps *plugs) claim(id string, kinds ...hypervisor.Kind) (*plug, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.all {
		if p.ID != id || !slices.Contains(kinds, p.Kind) {
			continue
		}
		if p.busy {
			return nil, fmt.Errorf("it is being plugged or unplugged: %w", errdefs.ErrFailedPrecondition)
		}
		p.busy = true
		return p, nil
	}
	return nil, fmt.Errorf("it was not plugged: %w", errdefs.ErrNotFound)
}

// find returns the only device of a kind; nil when there is none.
func (ps *plugs) find(kind hypervisor.Kind) *plug {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, p := range ps.all {
		if p.Kind == kind {
			return p
		}
	}
	return nil
}

// settle gives a device back; one of which nothing is left is forgotten.
func (ps *plugs) settle(p *plug) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.busy = false
	if p.done == 0 {
		delete(ps.all, p.name())
	}
}

// list is in the order of kinds and slots.
func (ps *plugs) list() []hypervisor.Plugged {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	var list []hypervisor.Plugged
	for _, p := range ps.all {
		list = append(list, p.Plugged)
	}
	slices.SortFunc(list, func(a, b hypervisor.Plugged) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Slot, b.Slot))
	})
	return list
}

// event tells a device what QEMU says of it. It does not block.
func (ps *plugs) event(e qmp.Event) {
	name, why := departure(e)
	if name == "" {
		return
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.all[name]
	if p == nil {
		return
	}
	if why == "" {
		select {
		case <-p.gone: // QEMU said it twice
		default:
			close(p.gone)
		}
		return
	}
	select {
	case p.refused <- why:
	default:
	}
}

// departure reads an event on the removal of a device: which one, and why the
// guest keeps it; empty when it is gone. The name is empty for other events.
func departure(e qmp.Event) (name, why string) {
	var data struct {
		Device string // empty for parts of a device
		Msg    string
		Info   struct { // ACPIOSTInfo in qapi/acpi.json
			Device         string
			Source, Status uint32
		}
	}
	if json.Unmarshal(e.Data, &data) != nil {
		return "", ""
	}
	switch e.Name {
	case "DEVICE_DELETED":
		return data.Device, ""
	case "DEVICE_UNPLUG_GUEST_ERROR":
		return data.Device, "the guest has an error"
	case "MEM_UNPLUG_ERROR":
		return data.Device, cmp.Or(data.Msg, "the memory has an error")
	case "ACPI_DEVICE_OST":
		if ostRefuses(data.Info.Source, data.Info.Status) {
			return data.Info.Device, fmt.Sprintf("acpi status %#x", data.Info.Status)
		}
	}
	return "", ""
}

// ostRefuses tells an ejection that failed from one that succeeded or goes on
// (ACPI 6.5, 6.3.5, _OST).
func ostRefuses(source, status uint32) bool {
	const (
		ejectRequest     = 0x3
		ejectProcessing  = 0x103
		success          = 0
		ejectionProgress = 0x84
	)
	return (source == ejectRequest || source == ejectProcessing) && status != success && status != ejectionProgress
}
