package guest

import (
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups/fs2"
)

// maxCPU bounds the numbers in a list: Linux has at most 8192 CPUs.
const maxCPU = 8192

// clamp returns the part of a list of CPUs or memory nodes ("0-2,7") that the
// guest has. A host's list means little here: when nothing is left, or the list
// is not one, the answer is empty, which is everything.
func clamp(list, have string) string {
	if list == "" {
		return ""
	}
	want, ok := parseList(list)
	got, okHave := parseList(have)
	if !ok || !okHave {
		return ""
	}
	for n := range want {
		want[n] = want[n] && n < len(got) && got[n]
	}
	return formatList(want)
}

func parseList(s string) (set []bool, ok bool) {
	for part := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		lo, hi, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			hi = lo
		}
		first, err1 := strconv.ParseUint(lo, 10, 16)
		last, err2 := strconv.ParseUint(hi, 10, 16)
		if err1 != nil || err2 != nil || first > last || last >= maxCPU {
			return nil, false
		}
		for n := int(first); n <= int(last); n++ {
			for len(set) <= n {
				set = append(set, false)
			}
			set[n] = true
		}
	}
	return set, true
}

func formatList(set []bool) string {
	var parts []string
	for n := 0; n < len(set); n++ {
		if !set[n] {
			continue
		}
		first := n
		for n+1 < len(set) && set[n+1] {
			n++
		}
		part := strconv.Itoa(first)
		if n > first {
			part += "-" + strconv.Itoa(n)
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, ",")
}

// clampCPUs cuts both lists of a container to what the guest has now.
func clampCPUs(cpus, mems *string) {
	for _, l := range []struct {
		list *string
		file string
	}{{cpus, "cpuset.cpus.effective"}, {mems, "cpuset.mems.effective"}} {
		if *l.list == "" {
			continue
		}
		have, err := os.ReadFile(fs2.UnifiedMountpoint + "/" + l.file)
		if err != nil {
			*l.list = ""
			continue
		}
		*l.list = clamp(*l.list, string(have))
	}
}

// A cpuset is what a container was given, whether the guest has it or not.
type cpuset struct{ cpus, mems string }

// clamp is the part of it that the guest has now.
func (c cpuset) clamp() (cpus, mems string) {
	clampCPUs(&c.cpus, &c.mems)
	return c.cpus, c.mems
}
