package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// growTimeout bounds how long a machine is waited for that is to change its
// size; a guest that gives memory back may take long.
const growTimeout = 20 * time.Second

// A resizer is a machine that changes its size while it runs.
type resizer interface {
	ResizeCPUs(ctx context.Context, n int) (now int, err error)
	ResizeMemory(ctx context.Context, mib int) (now hypervisor.Memory, err error)
}

// roomToGrow lets a pod's machine become as big as the host: how many containers
// will come, and with what limits, only some of those who make pods say.
func roomToGrow(m hypervisor.Spec, host capacity) hypervisor.Spec {
	m.MaxVCPUs = max(m.MaxVCPUs, host.CPUs)
	m.MaxMemoryMiB = max(m.MaxMemoryMiB, host.MemoryMiB)
	return m
}

// plus adds up what two containers may use.
func (l limits) plus(m limits) limits {
	return limits{CPUs: l.CPUs + m.CPUs, MemoryBytes: l.MemoryBytes + m.MemoryBytes, HugeBytes: l.HugeBytes + m.HugeBytes}
}

// or has the greater ones.
func (l limits) or(m limits) limits {
	return limits{CPUs: max(l.CPUs, m.CPUs), MemoryBytes: max(l.MemoryBytes, m.MemoryBytes), HugeBytes: max(l.HugeBytes, m.HugeBytes)}
}

// wanted is what the pod may use: what was said of it when it began, or the sum
// of what its containers may.
func (s *Sandbox) wanted() limits {
	s.mu.Lock()
	defer s.mu.Unlock()
	var sum limits
	for _, l := range s.limits {
		sum = sum.plus(l)
	}
	return sum.or(s.pod)
}

// setLimits notes a container's; nil: it is gone.
func (s *Sandbox) setLimits(id string, l *limits) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l == nil {
		delete(s.limits, id)
		return
	}
	s.limits[id] = *l
}

// raiseLimits notes that an update may give a container more.
func (s *Sandbox) raiseLimits(id string, r *specs.LinuxResources) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits[id] = s.limits[id].or(resourceLimits(r))
}

// replaceLimits notes what an update gave it.
func (s *Sandbox) replaceLimits(id string, r *specs.LinuxResources) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits[id] = s.limits[id].updated(r)
}

// updated are the limits after an update. What it does not name stays.
func (l limits) updated(r *specs.LinuxResources) limits {
	next := resourceLimits(r)
	if r.CPU == nil || r.CPU.Quota == nil || *r.CPU.Quota == 0 {
		next.CPUs = l.CPUs
	}
	if r.Memory == nil || r.Memory.Limit == nil || *r.Memory.Limit == 0 {
		next.MemoryBytes = l.MemoryBytes
	}
	if len(r.HugepageLimits) == 0 {
		next.HugeBytes = l.HugeBytes
	}
	return next
}

// Update replaces what was said of the pod when it began, and gives the machine
// the size for it.
func (s *Sandbox) Update(ctx context.Context, r *specs.LinuxResources) error {
	s.mu.Lock()
	s.pod = s.pod.updated(r)
	s.mu.Unlock()
	if err := s.resize(ctx); err != nil {
		return fmt.Errorf("resize machine: %w", err)
	}
	return nil
}

// fit gives the machine of a pod the size that its containers want. What can't
// be had is a warning: their limits hold all the same.
func (s *Sandbox) fit(ctx context.Context) {
	if !s.opts.Pod {
		return
	}
	if err := s.resize(ctx); err != nil {
		if err = s.because(err); s.alive() == nil {
			log.G(ctx).WithError(err).Warn("the machine is not as big as its containers may become")
		}
	}
}

func (s *Sandbox) resize(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, growTimeout)
	defer cancel()
	select { // one at a time, each with the sum as it is by then
	case s.resizing <- struct{}{}:
		defer func() { <-s.resizing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	want := size(s.opts.Config.Machine, s.wanted(), hostCapacity())
	now := s.state.snapshot()
	if want.VCPUs <= now.VCPUs && want.MemoryMiB == now.MemoryMiB {
		return nil
	}
	machine, ok := s.machine.(resizer)
	if !ok {
		return fmt.Errorf("machine of this hypervisor: %w", errdefs.ErrNotImplemented)
	}
	return errors.Join(s.resizeCPUs(ctx, machine, now.VCPUs, want.VCPUs), s.resizeMemory(ctx, machine, now.MemoryMiB, want.MemoryMiB))
}

// resizeCPUs only adds: a CPU that has nothing to do costs next to nothing, and
// not every QEMU survives its removal.
func (s *Sandbox) resizeCPUs(ctx context.Context, machine resizer, now, want int) error {
	if want <= now {
		return nil
	}
	got, err := machine.ResizeCPUs(ctx, want)
	if got > now {
		// Also when the guest does not take them: it would not the next time.
		err = errors.Join(err, s.state.update(func(st *State) { st.VCPUs = got }))
	}
	if err == nil {
		err = s.agent.OnlineCPUMem(ctx, uint32(got-now), true)
	}
	return err
}

func (s *Sandbox) resizeMemory(ctx context.Context, machine resizer, now, want int) error {
	if want == now {
		return nil
	}
	got, err := machine.ResizeMemory(ctx, want)
	if got.MiB > 0 {
		err = errors.Join(err, s.state.update(func(st *State) { st.MemoryMiB = got.MiB }))
	}
	return err
}
