package sandbox

import (
	"math"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

func TestSize(t *testing.T) {
	const mib = 1 << 20
	cpu := func(quota int64, period uint64, cpus string) *specs.LinuxCPU {
		return &specs.LinuxCPU{Quota: &quota, Period: &period, Cpus: cpus}
	}
	memory := func(limit int64) *specs.LinuxMemory { return &specs.LinuxMemory{Limit: &limit} }
	for _, tt := range []struct {
		name        string
		res         *specs.LinuxResources
		annotations map[string]string
		cpus, mem   int
	}{
		{name: "nothing asked", cpus: 1, mem: 256},
		{name: "empty", res: &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}, cpus: 1, mem: 256},
		{name: "memory is added", res: &specs.LinuxResources{Memory: memory(64 * mib)}, cpus: 1, mem: 320},
		{name: "memory is rounded up", res: &specs.LinuxResources{Memory: memory(64*mib + 1)}, cpus: 1, mem: 321},
		{name: "no more than the host has", res: &specs.LinuxResources{Memory: memory(1 << 40)}, cpus: 1, mem: 4096},
		{name: "no limit", res: &specs.LinuxResources{Memory: memory(-1)}, cpus: 1, mem: 256},
		{name: "no limit as engines write it", res: &specs.LinuxResources{Memory: memory(math.MaxInt64 &^ 4095)}, cpus: 1, mem: 256},
		{name: "huge pages are added, too", res: &specs.LinuxResources{Memory: memory(64 * mib), HugepageLimits: []specs.LinuxHugepageLimit{
			{Pagesize: "2MB", Limit: 8 * mib}, {Pagesize: "64KB", Limit: mib}, {Pagesize: "1GB", Limit: math.MaxInt64},
		}}, cpus: 1, mem: 329},
		{name: "quota", res: &specs.LinuxResources{CPU: cpu(150000, 100000, "")}, cpus: 2, mem: 256},
		{name: "half a CPU", res: &specs.LinuxResources{CPU: cpu(50000, 100000, "")}, cpus: 1, mem: 256},
		{name: "no quota", res: &specs.LinuxResources{CPU: cpu(-1, 100000, "")}, cpus: 1, mem: 256},
		{name: "no period", res: &specs.LinuxResources{CPU: cpu(1, 0, "")}, cpus: 1, mem: 256},
		{name: "more than the host has", res: &specs.LinuxResources{CPU: cpu(math.MaxInt64, 1, "")}, cpus: 8, mem: 256},
		{name: "set of CPUs", res: &specs.LinuxResources{CPU: cpu(0, 0, "0-2,5")}, cpus: 4, mem: 256},
		{name: "quota before set", res: &specs.LinuxResources{CPU: cpu(200000, 100000, "0-2,5")}, cpus: 2, mem: 256},
		{name: "a pod", annotations: map[string]string{
			annotationMemory: "134217728", annotationQuota: "300000", annotationPeriod: "100000",
		}, cpus: 3, mem: 384},
		{name: "a bad pod", annotations: map[string]string{annotationMemory: "x", annotationPeriod: "-1"}, cpus: 1, mem: 256},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := &specs.Spec{Annotations: tt.annotations}
			if tt.res != nil {
				spec.Linux = &specs.Linux{Resources: tt.res}
			}
			base := hypervisor.Spec{VCPUs: 1, MaxVCPUs: 1, MemoryMiB: 256, MaxMemoryMiB: 256}
			got := size(base, limitsOf(spec), capacity{CPUs: 8, MemoryMiB: 4096})
			if got.VCPUs != tt.cpus || got.MaxVCPUs != tt.cpus || got.MemoryMiB != tt.mem || got.MaxMemoryMiB != tt.mem {
				t.Errorf("got %+v, want %d CPUs and %d MiB", got, tt.cpus, tt.mem)
			}
		})
	}
	// The operator's choice stands, even beyond the host.
	base := hypervisor.Spec{VCPUs: 16, MaxVCPUs: 32, MemoryMiB: 8192, MaxMemoryMiB: 16384}
	if got := size(base, limits{CPUs: 2, MemoryBytes: 1}, capacity{CPUs: 8, MemoryMiB: 4096}); got.VCPUs != 16 || got.MaxVCPUs != 32 ||
		got.MemoryMiB != 8192 || got.MaxMemoryMiB != 16384 {
		t.Errorf("got %+v", got)
	}
}

func TestCountCPUs(t *testing.T) {
	for list, want := range map[string]int{"": 0, "0": 1, "0-3": 4, "0,2,4-5\n": 4, "x": 0, "3-1": 0, "1-": 0, "-1": 0} {
		if got := countCPUs(list); got != want {
			t.Errorf("%q: got %d, want %d", list, got, want)
		}
	}
}
