package guest

import (
	"maps"
	"slices"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// unset0 is how the protocol's fields become optional ones.
func unset0[T int64 | uint64 | uint32 | uint16](v T) *T {
	if v == 0 {
		return nil
	}
	return &v
}

// toResources never returns nil. Real-time scheduling and network classes, which
// control groups of version 2 do not have, are dropped.
func toResources(in *protocol.LinuxResources) *specs.LinuxResources {
	out := &specs.LinuxResources{
		Devices: convert(in.GetDevices(), toDeviceRule),
		BlockIO: toBlockIO(in.GetBlockIO()),
		HugepageLimits: convert(in.GetHugepageLimits(), func(l *protocol.LinuxHugepageLimit) specs.LinuxHugepageLimit {
			return specs.LinuxHugepageLimit{Pagesize: l.GetPagesize(), Limit: l.GetLimit()}
		}),
		Unified: maps.Clone(in.GetUnified()),
	}
	if m := in.GetMemory(); m != nil {
		out.Memory = &specs.LinuxMemory{
			Limit: unset0(m.GetLimit()), Reservation: unset0(m.GetReservation()), Swap: unset0(m.GetSwap()),
		}
	}
	if c := in.GetCPU(); c != nil {
		out.CPU = &specs.LinuxCPU{
			Shares: unset0(c.GetShares()), Quota: unset0(c.GetQuota()), Period: unset0(c.GetPeriod()),
			Cpus: c.GetCpus(), Mems: c.GetMems(),
		}
	}
	if p := in.GetPids(); p != nil {
		out.Pids = &specs.LinuxPids{Limit: unset0(p.GetLimit())}
	}
	return out
}

func toDeviceRule(d *protocol.LinuxDeviceCgroup) specs.LinuxDeviceCgroup {
	return specs.LinuxDeviceCgroup{
		Allow: d.GetAllow(), Type: d.GetType(), Major: new(d.GetMajor()), Minor: new(d.GetMinor()), Access: d.GetAccess(),
	}
}

func toBlockIO(in *protocol.LinuxBlockIO) *specs.LinuxBlockIO {
	if in == nil {
		return nil
	}
	throttle := func(d *protocol.LinuxThrottleDevice) specs.LinuxThrottleDevice {
		out := specs.LinuxThrottleDevice{Rate: d.GetRate()}
		out.Major, out.Minor = d.GetMajor(), d.GetMinor()
		return out
	}
	return &specs.LinuxBlockIO{
		Weight: unset0(uint16(in.GetWeight())),
		WeightDevice: convert(in.GetWeightDevice(), func(d *protocol.LinuxWeightDevice) specs.LinuxWeightDevice {
			out := specs.LinuxWeightDevice{Weight: unset0(uint16(d.GetWeight()))}
			out.Major, out.Minor = d.GetMajor(), d.GetMinor()
			return out
		}),
		ThrottleReadBpsDevice:   convert(in.GetThrottleReadBpsDevice(), throttle),
		ThrottleWriteBpsDevice:  convert(in.GetThrottleWriteBpsDevice(), throttle),
		ThrottleReadIOPSDevice:  convert(in.GetThrottleReadIOPSDevice(), throttle),
		ThrottleWriteIOPSDevice: convert(in.GetThrottleWriteIOPSDevice(), throttle),
	}
}

// mergeResources returns what a running container's limits become: what the
// update does not mention stays.
func mergeResources(old *cgroups.Resources, in *protocol.LinuxResources) *cgroups.Resources {
	r := *old
	if m := in.GetMemory(); m != nil {
		mergeMemory(&r, m)
	}
	if c := in.GetCPU(); c != nil {
		set(&r.CpuQuota, c.GetQuota())
		set(&r.CpuPeriod, c.GetPeriod())
		set(&r.CpusetCpus, c.GetCpus())
		set(&r.CpusetMems, c.GetMems())
		if s := c.GetShares(); s != 0 {
			r.CpuShares, r.CpuWeight = s, cgroups.ConvertCPUSharesToCgroupV2Value(s)
		}
	}
	if p := in.GetPids().GetLimit(); p != 0 {
		r.PidsLimit = &p
	}
	if w := in.GetBlockIO().GetWeight(); w != 0 {
		r.BlkioWeight = uint16(w)
	}
	for _, l := range in.GetHugepageLimits() {
		r.HugetlbLimit = append(slices.Clip(r.HugetlbLimit),
			&cgroups.HugepageLimit{Pagesize: l.GetPagesize(), Limit: l.GetLimit()})
	}
	// Not kept: a later update would write them again.
	r.Unified = maps.Clone(in.GetUnified())
	return &r
}

// mergeMemory keeps the invariant memory+swap >= memory when only the limit is
// given: the distance between the two, which is the swap, stays.
func mergeMemory(r *cgroups.Resources, m *protocol.LinuxMemory) {
	limit, swap := m.GetLimit(), m.GetSwap()
	switch {
	case swap != 0:
		r.MemorySwap = swap
	case limit < 0:
		r.MemorySwap = 0
	case limit > 0 && r.MemorySwap > 0:
		r.MemorySwap += limit - max(r.Memory, 0)
	}
	set(&r.Memory, limit)
	set(&r.MemoryReservation, m.GetReservation())
}

func set[T comparable](dst *T, v T) {
	var zero T
	if v != zero {
		*dst = v
	}
}
