package shim

import (
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/cgroups/v3"
	stats1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	stats2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// metrics turns the guest's numbers into the type that containerd and the
// kubelet expect on this host: they choose by the host's cgroup version, and
// know nothing of the guest's, which is always 2.
func metrics(r *protocol.StatsContainerResponse, unified bool) (*anypb.Any, error) {
	var m proto.Message = metrics1(r)
	if unified {
		m = metrics2(r)
	}
	return encodeMetrics(m)
}

func encodeMetrics(m proto.Message) (*anypb.Any, error) {
	value, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode metrics: %w", err)
	}
	// typeurl's form of a type name: without a host in front.
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: value}, nil
}

// hostUnified says whether the host has cgroup version 2 only.
func hostUnified() bool { return cgroups.Mode() == cgroups.Unified }

func metrics1(r *protocol.StatsContainerResponse) *stats1.Metrics {
	s := r.GetCgroupStats()
	cpu, mem := s.GetCpuStats(), s.GetMemoryStats()
	st := mem.GetStats()
	m := &stats1.Metrics{
		Pids: &stats1.PidsStat{
			Current: s.GetPidsStats().GetCurrent(),
			Limit:   s.GetPidsStats().GetLimit(),
		},
		CPU: &stats1.CPUStat{
			Usage: &stats1.CPUUsage{
				Total:  cpu.GetCpuUsage().GetTotalUsage(),
				Kernel: cpu.GetCpuUsage().GetUsageInKernelmode(),
				User:   cpu.GetCpuUsage().GetUsageInUsermode(),
				PerCPU: cpu.GetCpuUsage().GetPercpuUsage(),
			},
			Throttling: &stats1.Throttle{
				Periods:          cpu.GetThrottlingData().GetPeriods(),
				ThrottledPeriods: cpu.GetThrottlingData().GetThrottledPeriods(),
				ThrottledTime:    cpu.GetThrottlingData().GetThrottledTime(),
			},
		},
		Memory: &stats1.MemoryStat{
			Cache:             mem.GetCache(),
			TotalCache:        mem.GetCache(),
			RSS:               st["anon"],
			TotalRSS:          st["anon"],
			RSSHuge:           st["anon_thp"],
			TotalRSSHuge:      st["anon_thp"],
			MappedFile:        st["file_mapped"],
			TotalMappedFile:   st["file_mapped"],
			Dirty:             st["file_dirty"],
			TotalDirty:        st["file_dirty"],
			Writeback:         st["file_writeback"],
			TotalWriteback:    st["file_writeback"],
			PgFault:           st["pgfault"],
			TotalPgFault:      st["pgfault"],
			PgMajFault:        st["pgmajfault"],
			TotalPgMajFault:   st["pgmajfault"],
			InactiveAnon:      st["inactive_anon"],
			TotalInactiveAnon: st["inactive_anon"],
			ActiveAnon:        st["active_anon"],
			TotalActiveAnon:   st["active_anon"],
			InactiveFile:      st["inactive_file"],
			TotalInactiveFile: st["inactive_file"],
			ActiveFile:        st["active_file"],
			TotalActiveFile:   st["active_file"],
			Unevictable:       st["unevictable"],
			TotalUnevictable:  st["unevictable"],
			Usage:             memoryEntry(mem.GetUsage()),
			Swap:              memoryEntry(mem.GetSwapUsage()),
			Kernel:            memoryEntry(mem.GetKernelUsage()),
			// What the limit of a version 1 group would be called.
			HierarchicalMemoryLimit: mem.GetUsage().GetLimit(),
			HierarchicalSwapLimit:   mem.GetSwapUsage().GetLimit(),
		},
		Blkio: &stats1.BlkIOStat{
			IoServiceBytesRecursive: blkioEntries(s.GetBlkioStats().GetIoServiceBytesRecursive()),
			IoServicedRecursive:     blkioEntries(s.GetBlkioStats().GetIoServicedRecursive()),
			IoQueuedRecursive:       blkioEntries(s.GetBlkioStats().GetIoQueuedRecursive()),
			IoServiceTimeRecursive:  blkioEntries(s.GetBlkioStats().GetIoServiceTimeRecursive()),
			IoWaitTimeRecursive:     blkioEntries(s.GetBlkioStats().GetIoWaitTimeRecursive()),
			IoMergedRecursive:       blkioEntries(s.GetBlkioStats().GetIoMergedRecursive()),
			IoTimeRecursive:         blkioEntries(s.GetBlkioStats().GetIoTimeRecursive()),
			SectorsRecursive:        blkioEntries(s.GetBlkioStats().GetSectorsRecursive()),
		},
		MemoryOomControl: &stats1.MemoryOomControl{OomKill: s.GetMemoryEvents()["oom_kill"]},
	}
	for _, size := range slices.Sorted(maps.Keys(s.GetHugetlbStats())) {
		h := s.GetHugetlbStats()[size]
		m.Hugetlb = append(m.Hugetlb, &stats1.HugetlbStat{
			Pagesize: size, Usage: h.GetUsage(), Max: h.GetMaxUsage(), Failcnt: h.GetFailcnt(),
		})
	}
	for _, n := range r.GetNetworkStats() {
		m.Network = append(m.Network, &stats1.NetworkStat{
			Name:    n.GetName(),
			RxBytes: n.GetRxBytes(), RxPackets: n.GetRxPackets(), RxErrors: n.GetRxErrors(), RxDropped: n.GetRxDropped(),
			TxBytes: n.GetTxBytes(), TxPackets: n.GetTxPackets(), TxErrors: n.GetTxErrors(), TxDropped: n.GetTxDropped(),
		})
	}
	return m
}

func memoryEntry(d *protocol.MemoryData) *stats1.MemoryEntry {
	return &stats1.MemoryEntry{
		Limit: d.GetLimit(), Usage: d.GetUsage(), Max: d.GetMaxUsage(), Failcnt: d.GetFailcnt(),
	}
}

func blkioEntries(in []*protocol.BlkioStatsEntry) []*stats1.BlkIOEntry {
	var out []*stats1.BlkIOEntry
	for _, e := range in {
		out = append(out, &stats1.BlkIOEntry{
			Op: e.GetOp(), Major: e.GetMajor(), Minor: e.GetMinor(), Value: e.GetValue(),
		})
	}
	return out
}

func metrics2(r *protocol.StatsContainerResponse) *stats2.Metrics {
	const usec = 1000 // nanoseconds
	s := r.GetCgroupStats()
	cpu, mem, events := s.GetCpuStats(), s.GetMemoryStats(), s.GetMemoryEvents()
	st := mem.GetStats()
	m := &stats2.Metrics{
		Pids: &stats2.PidsStat{
			Current: s.GetPidsStats().GetCurrent(),
			Limit:   s.GetPidsStats().GetLimit(),
		},
		CPU: &stats2.CPUStat{
			UsageUsec:     cpu.GetCpuUsage().GetTotalUsage() / usec,
			UserUsec:      cpu.GetCpuUsage().GetUsageInUsermode() / usec,
			SystemUsec:    cpu.GetCpuUsage().GetUsageInKernelmode() / usec,
			NrPeriods:     cpu.GetThrottlingData().GetPeriods(),
			NrThrottled:   cpu.GetThrottlingData().GetThrottledPeriods(),
			ThrottledUsec: cpu.GetThrottlingData().GetThrottledTime() / usec,
		},
		Memory: &stats2.MemoryStat{
			Anon:                  st["anon"],
			File:                  st["file"],
			KernelStack:           st["kernel_stack"],
			Slab:                  st["slab"],
			Sock:                  st["sock"],
			Shmem:                 st["shmem"],
			FileMapped:            st["file_mapped"],
			FileDirty:             st["file_dirty"],
			FileWriteback:         st["file_writeback"],
			AnonThp:               st["anon_thp"],
			InactiveAnon:          st["inactive_anon"],
			ActiveAnon:            st["active_anon"],
			InactiveFile:          st["inactive_file"],
			ActiveFile:            st["active_file"],
			Unevictable:           st["unevictable"],
			SlabReclaimable:       st["slab_reclaimable"],
			SlabUnreclaimable:     st["slab_unreclaimable"],
			Pgfault:               st["pgfault"],
			Pgmajfault:            st["pgmajfault"],
			WorkingsetRefault:     st["workingset_refault"],
			WorkingsetActivate:    st["workingset_activate"],
			WorkingsetNodereclaim: st["workingset_nodereclaim"],
			Pgrefill:              st["pgrefill"],
			Pgscan:                st["pgscan"],
			Pgsteal:               st["pgsteal"],
			Pgactivate:            st["pgactivate"],
			Pgdeactivate:          st["pgdeactivate"],
			Pglazyfree:            st["pglazyfree"],
			Pglazyfreed:           st["pglazyfreed"],
			ThpFaultAlloc:         st["thp_fault_alloc"],
			ThpCollapseAlloc:      st["thp_collapse_alloc"],
			Usage:                 mem.GetUsage().GetUsage(),
			UsageLimit:            mem.GetUsage().GetLimit(),
			MaxUsage:              mem.GetUsage().GetMaxUsage(),
			SwapUsage:             mem.GetSwapUsage().GetUsage(),
			SwapLimit:             mem.GetSwapUsage().GetLimit(),
			SwapMaxUsage:          mem.GetSwapUsage().GetMaxUsage(),
		},
		MemoryEvents: &stats2.MemoryEvents{
			Low: events["low"], High: events["high"], Max: events["max"],
			Oom: events["oom"], OomKill: events["oom_kill"], OomGroupKill: events["oom_group_kill"],
		},
		Io: &stats2.IOStat{Usage: ioEntries(s.GetBlkioStats())},
	}
	for _, size := range slices.Sorted(maps.Keys(s.GetHugetlbStats())) {
		h := s.GetHugetlbStats()[size]
		m.Hugetlb = append(m.Hugetlb, &stats2.HugeTlbStat{
			Pagesize: size, Current: h.GetUsage(), Max: h.GetMaxUsage(), Failcnt: h.GetFailcnt(),
		})
	}
	for _, n := range r.GetNetworkStats() {
		m.Network = append(m.Network, &stats2.NetworkStat{
			Name:    n.GetName(),
			RxBytes: n.GetRxBytes(), RxPackets: n.GetRxPackets(), RxErrors: n.GetRxErrors(), RxDropped: n.GetRxDropped(),
			TxBytes: n.GetTxBytes(), TxPackets: n.GetTxPackets(), TxErrors: n.GetTxErrors(), TxDropped: n.GetTxDropped(),
		})
	}
	return m
}

// ioEntries gathers the entries of the agent protocol, one per device and
// operation, into one per device.
func ioEntries(b *protocol.BlkioStats) []*stats2.IOEntry {
	type device struct{ major, minor uint64 }
	var (
		out   []*stats2.IOEntry
		index = map[device]*stats2.IOEntry{}
	)
	entry := func(e *protocol.BlkioStatsEntry) *stats2.IOEntry {
		d := device{e.GetMajor(), e.GetMinor()}
		if index[d] == nil {
			index[d] = &stats2.IOEntry{Major: d.major, Minor: d.minor}
			out = append(out, index[d])
		}
		return index[d]
	}
	for _, e := range b.GetIoServiceBytesRecursive() {
		switch e.GetOp() {
		case "Read":
			entry(e).Rbytes += e.GetValue()
		case "Write":
			entry(e).Wbytes += e.GetValue()
		}
	}
	for _, e := range b.GetIoServicedRecursive() {
		switch e.GetOp() {
		case "Read":
			entry(e).Rios += e.GetValue()
		case "Write":
			entry(e).Wios += e.GetValue()
		}
	}
	return out
}
