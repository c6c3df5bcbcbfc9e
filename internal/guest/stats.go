package guest

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fs2"
	"github.com/vishvananda/netlink"

	"github.com/vmshim/vmshim/internal/rtnetlink"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// StatsContainer implements the protocol. It waits for nothing that the
// container does.
func (s *service) StatsContainer(_ context.Context, req *protocol.StatsContainerRequest) (*protocol.StatsContainerResponse, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	if c.current() == creating {
		return nil, precondition("container %q is %s", c.id, creating)
	}
	stats, err := c.group.stats()
	if err != nil {
		return nil, fmt.Errorf("stats of container %q: %w", c.id, err)
	}
	network, err := s.sandbox.network.stats()
	if err != nil {
		return nil, fmt.Errorf("stats of container %q: %w", c.id, err)
	}
	return &protocol.StatsContainerResponse{CgroupStats: stats, NetworkStats: network}, nil
}

func (g cgroup) stats() (*protocol.CgroupStats, error) {
	m, err := fs2.NewManager(&cgroups.Cgroup{}, string(g))
	if err != nil {
		return nil, err
	}
	stats, err := m.GetStats()
	if err != nil {
		return nil, err
	}
	events, err := g.keyed("memory.events")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return toStats(stats, events), nil
}

// toStats puts the figures of a control group of version 2 into the protocol's
// message, which is made for version 1. Swap is swap alone, without memory.
func toStats(in *cgroups.Stats, events map[string]uint64) *protocol.CgroupStats {
	cpu, mem := in.CpuStats, in.MemoryStats
	out := &protocol.CgroupStats{
		CpuStats: &protocol.CpuStats{
			CpuUsage: &protocol.CpuUsage{
				TotalUsage:        cpu.CpuUsage.TotalUsage,
				PercpuUsage:       cpu.CpuUsage.PercpuUsage,
				UsageInKernelmode: cpu.CpuUsage.UsageInKernelmode,
				UsageInUsermode:   cpu.CpuUsage.UsageInUsermode,
			},
			ThrottlingData: &protocol.ThrottlingData{
				Periods:          cpu.ThrottlingData.Periods,
				ThrottledPeriods: cpu.ThrottlingData.ThrottledPeriods,
				ThrottledTime:    cpu.ThrottlingData.ThrottledTime,
			},
		},
		MemoryStats: &protocol.MemoryStats{
			Cache:        mem.Cache,
			Usage:        toMemory(mem.Usage),
			SwapUsage:    toMemory(mem.SwapOnlyUsage),
			KernelUsage:  toMemory(mem.KernelUsage),
			UseHierarchy: mem.UseHierarchy,
			Stats:        mem.Stats,
		},
		PidsStats:    &protocol.PidsStats{Current: in.PidsStats.Current, Limit: in.PidsStats.Limit},
		BlkioStats:   toBlkio(&in.BlkioStats),
		MemoryEvents: events,
	}
	if n := len(in.HugetlbStats); n > 0 {
		out.HugetlbStats = make(map[string]*protocol.HugetlbStats, n)
		for size, h := range in.HugetlbStats {
			out.HugetlbStats[size] = &protocol.HugetlbStats{Usage: h.Usage, MaxUsage: h.MaxUsage, Failcnt: h.Failcnt}
		}
	}
	return out
}

func toMemory(m cgroups.MemoryData) *protocol.MemoryData {
	return &protocol.MemoryData{Usage: m.Usage, MaxUsage: m.MaxUsage, Failcnt: m.Failcnt, Limit: m.Limit}
}

func toBlkio(in *cgroups.BlkioStats) *protocol.BlkioStats {
	entries := func(list []cgroups.BlkioStatEntry) []*protocol.BlkioStatsEntry {
		return convert(list, func(e cgroups.BlkioStatEntry) *protocol.BlkioStatsEntry {
			return &protocol.BlkioStatsEntry{Major: e.Major, Minor: e.Minor, Op: e.Op, Value: e.Value}
		})
	}
	return &protocol.BlkioStats{
		IoServiceBytesRecursive: entries(in.IoServiceBytesRecursive),
		IoServicedRecursive:     entries(in.IoServicedRecursive),
		IoQueuedRecursive:       entries(in.IoQueuedRecursive),
		IoServiceTimeRecursive:  entries(in.IoServiceTimeRecursive),
		IoWaitTimeRecursive:     entries(in.IoWaitTimeRecursive),
		IoMergedRecursive:       entries(in.IoMergedRecursive),
		IoTimeRecursive:         entries(in.IoTimeRecursive),
		SectorsRecursive:        entries(in.SectorsRecursive),
	}
}

// stats are those of the sandbox' interfaces but the loopback one, which all containers share.
func (n *network) stats() ([]*protocol.NetworkStats, error) {
	var stats []*protocol.NetworkStats
	err := n.look(func(h *netlink.Handle) error {
		links, err := rtnetlink.Dump(h.LinkList)
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, link := range links {
			a := link.Attrs()
			if s := a.Statistics; s != nil && a.Flags&ifLoopback == 0 {
				stats = append(stats, &protocol.NetworkStats{
					Name:    a.Name,
					RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
					TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
				})
			}
		}
		return nil
	})
	return stats, err
}
