package shim

import (
	"testing"

	stats1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	stats2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func guestStats() *protocol.StatsContainerResponse {
	return &protocol.StatsContainerResponse{
		CgroupStats: &protocol.CgroupStats{
			CpuStats: &protocol.CpuStats{
				CpuUsage:       &protocol.CpuUsage{TotalUsage: 3000, UsageInUsermode: 2000, UsageInKernelmode: 1000},
				ThrottlingData: &protocol.ThrottlingData{Periods: 5, ThrottledPeriods: 4, ThrottledTime: 3000},
			},
			MemoryStats: &protocol.MemoryStats{
				Cache: 7,
				Usage: &protocol.MemoryData{Usage: 100, MaxUsage: 120, Failcnt: 2, Limit: 200},
				Stats: map[string]uint64{"anon": 50, "inactive_file": 20, "pgfault": 9},
			},
			PidsStats: &protocol.PidsStats{Current: 3, Limit: 10},
			BlkioStats: &protocol.BlkioStats{
				IoServiceBytesRecursive: []*protocol.BlkioStatsEntry{
					{Major: 8, Minor: 1, Op: "Read", Value: 11},
					{Major: 8, Minor: 1, Op: "Write", Value: 12},
					{Major: 8, Minor: 2, Op: "Read", Value: 13},
				},
				IoServicedRecursive: []*protocol.BlkioStatsEntry{{Major: 8, Minor: 1, Op: "Read", Value: 14}, {Major: 8, Minor: 1, Op: "Write", Value: 15}},
			},
			HugetlbStats: map[string]*protocol.HugetlbStats{"2MB": {Usage: 1, MaxUsage: 2, Failcnt: 3}, "1GB": {Usage: 4}},
			MemoryEvents: map[string]uint64{"oom": 2, "oom_kill": 1},
		},
		NetworkStats: []*protocol.NetworkStats{{Name: "eth0", RxBytes: 1, TxPackets: 2}},
	}
}

func TestMetrics1(t *testing.T) {
	a, err := metrics(guestStats(), false)
	if err != nil {
		t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(a)
	if err != nil {
		t.Fatal(err)
	}
	m := v.(*stats1.Metrics)
	if m.GetCPU().GetUsage().GetTotal() != 3000 || m.GetMemory().GetUsage().GetUsage() != 100 ||
		m.GetMemory().GetTotalInactiveFile() != 20 || m.GetMemory().GetTotalRSS() != 50 ||
		m.GetMemoryOomControl().GetOomKill() != 1 || m.GetPids().GetCurrent() != 3 ||
		m.GetNetwork()[0].GetRxBytes() != 1 || len(m.GetBlkio().GetIoServiceBytesRecursive()) != 3 {
		t.Errorf("metrics %v", m)
	}
	if len(m.GetHugetlb()) != 2 || m.GetHugetlb()[0].GetPagesize() != "1GB" {
		t.Errorf("hugetlb %v", m.GetHugetlb())
	}
}

func TestMetrics2(t *testing.T) {
	a, err := metrics(guestStats(), true)
	if err != nil {
		t.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(a)
	if err != nil {
		t.Fatal(err)
	}
	want := &stats2.Metrics{
		Pids: &stats2.PidsStat{Current: 3, Limit: 10},
		CPU:  &stats2.CPUStat{UsageUsec: 3, UserUsec: 2, SystemUsec: 1, NrPeriods: 5, NrThrottled: 4, ThrottledUsec: 3},
		Memory: &stats2.MemoryStat{
			Anon: 50, InactiveFile: 20, Pgfault: 9, Usage: 100, UsageLimit: 200, MaxUsage: 120,
		},
		MemoryEvents: &stats2.MemoryEvents{Oom: 2, OomKill: 1},
		Io: &stats2.IOStat{Usage: []*stats2.IOEntry{
			{Major: 8, Minor: 1, Rbytes: 11, Wbytes: 12, Rios: 14, Wios: 15}, {Major: 8, Minor: 2, Rbytes: 13},
		}},
		Hugetlb: []*stats2.HugeTlbStat{{Pagesize: "1GB", Current: 4}, {Pagesize: "2MB", Current: 1, Max: 2, Failcnt: 3}},
		Network: []*stats2.NetworkStat{{Name: "eth0", RxBytes: 1, TxPackets: 2}},
	}
	if diff := cmp.Diff(want, v, protocmp.Transform()); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// A guest that knows nothing yet is no crash.
func TestMetricsEmpty(t *testing.T) {
	for _, unified := range []bool{false, true} {
		if _, err := metrics(&protocol.StatsContainerResponse{}, unified); err != nil {
			t.Error(err)
		}
	}
}

// FuzzMetrics: whatever numbers a guest sends, containerd gets metrics that it
// can decode, of a size like theirs.
func FuzzMetrics(f *testing.F) {
	b, err := proto.Marshal(guestStats())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{})
	f.Add([]byte("\x0a\x00\x12\x00\x12\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &protocol.StatsContainerResponse{}
		if proto.Unmarshal(b, r) != nil {
			return
		}
		for _, unified := range []bool{false, true} {
			a, err := metrics(r, unified)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := typeurl.UnmarshalAny(a); err != nil {
				t.Error(err)
			}
			if len(a.GetValue()) > 8*len(b)+4096 {
				t.Errorf("%d bytes of %d", len(a.GetValue()), len(b))
			}
		}
	})
}
