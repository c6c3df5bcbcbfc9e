package sandbox

import (
	"math"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// capacity is what a machine can use of its host.
type capacity struct {
	CPUs      int
	MemoryMiB int
}

// limits are those of the containers of a sandbox; zero: none.
type limits struct {
	CPUs        int
	MemoryBytes int64
	HugeBytes   int64 // of huge pages, which are not charged to memory
}

// size makes the base big enough for the limits. Memory is added, because the
// base is what the guest itself needs; CPUs are shared with the guest. Neither
// grows beyond the host.
func size(base hypervisor.Spec, l limits, host capacity) hypervisor.Spec {
	add := mebibytes(l.MemoryBytes) + mebibytes(l.HugeBytes)
	base.MemoryMiB = max(base.MemoryMiB, min(base.MemoryMiB+add, host.MemoryMiB))
	base.MaxMemoryMiB = max(base.MaxMemoryMiB, base.MemoryMiB)
	base.VCPUs = max(base.VCPUs, min(l.CPUs, host.CPUs))
	base.MaxVCPUs = max(base.MaxVCPUs, base.VCPUs)
	return base
}

// mebibytes rounds up. A limit of more than an exabyte is none: engines write
// the greatest number, rounded to pages, for it.
func mebibytes(bytes int64) int {
	if bytes <= 0 || bytes >= 1<<60 {
		return 0
	}
	return int((bytes-1)>>20 + 1)
}

// Annotations with which CRI implementations tell the sandbox's container the
// sum of what its other containers will have.
const (
	annotationMemory = "io.kubernetes.cri.sandbox-memory"
	annotationQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	annotationPeriod = "io.kubernetes.cri.sandbox-cpu-period"
)

// limitsOf are the limits in the spec of a sandbox's first container.
func limitsOf(spec *specs.Spec) limits {
	l := resourceLimits(resourcesOf(spec))
	pod := func(name string) int64 {
		n, err := strconv.ParseInt(spec.Annotations[name], 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	l.MemoryBytes = max(l.MemoryBytes, pod(annotationMemory))
	l.CPUs = max(l.CPUs, cpus(pod(annotationQuota), uint64(max(0, pod(annotationPeriod)))))
	return l
}

func resourcesOf(spec *specs.Spec) *specs.LinuxResources {
	if spec.Linux == nil || spec.Linux.Resources == nil {
		return &specs.LinuxResources{}
	}
	return spec.Linux.Resources
}

// maxHuge is more than a host has: a greater limit is none.
const maxHuge = 1 << 50

func resourceLimits(r *specs.LinuxResources) (l limits) {
	if r.Memory != nil && r.Memory.Limit != nil {
		l.MemoryBytes = max(0, *r.Memory.Limit)
	}
	for _, h := range r.HugepageLimits {
		if h.Limit < maxHuge {
			l.HugeBytes += int64(h.Limit)
		}
	}
	if r.CPU == nil {
		return l
	}
	if r.CPU.Quota != nil && r.CPU.Period != nil {
		l.CPUs = cpus(*r.CPU.Quota, *r.CPU.Period)
	}
	if l.CPUs == 0 {
		l.CPUs = countCPUs(r.CPU.Cpus)
	}
	return l
}

// cpus rounds a quota up to whole CPUs.
func cpus(quota int64, period uint64) int {
	if quota <= 0 || period == 0 {
		return 0
	}
	n := math.Ceil(float64(quota) / float64(period))
	return int(min(n, math.MaxInt32))
}

// countCPUs counts a list in the form of cpuset(7), "0-2,7"; 0 when it is
// none.
func countCPUs(list string) int {
	n := 0
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}
		a, err := strconv.Atoi(first)
		if err != nil {
			return 0
		}
		b, err := strconv.Atoi(last)
		if err != nil || b < a {
			return 0
		}
		n += b - a + 1
	}
	return n
}
