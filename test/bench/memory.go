package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

const (
	// settle is how long a process has to give memory back.
	settle = 5 * time.Second
	// maxSettles bounds how often it has: Go's scavenger takes a hundredth of a
	// processor, which is little where the host is emulated.
	maxSettles = 24
)

// memory measures what an idle container takes on the host, process by
// process: its proportional set size, in which shared pages count in parts.
func (r *rig) memory(ctx context.Context, res *results) (err error) {
	c, err := r.launch(ctx, machineRuntime)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	st, err := r.state(c.id)
	if err != nil {
		return err
	}
	of, err := r.idleMemoryOf(ctx, st)
	if err != nil {
		return err
	}
	of.add(res, r.target.host)
	used, err := c.guestMemory(ctx)
	if err != nil {
		return err
	}
	res.add(result{Name: "memory that the guest uses itself", Value: used, Unit: "MiB"})
	if err := r.idleTime(ctx, st, res); err != nil {
		return err
	}
	a, err := c.connect()
	if err != nil {
		return err
	}
	defer a.Disconnect() //nolint:errcheck // nothing is under way
	_, used, err = agentUse(ctx, a)
	res.add(result{Name: "memory (RSS) of the agent in the guest", Value: used, Unit: "MiB", AtMost: 16})
	return err
}

// idleMemoryOf is memoryOf once it falls no more.
func (r *rig) idleMemoryOf(ctx context.Context, st *sandbox.State) (of footprint, err error) {
	for n, last := 0, math.Inf(1); n < maxSettles; n++ {
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return footprint{}, ctx.Err()
		}
		if of, err = r.memoryOf(st); err != nil {
			return footprint{}, err
		}
		if of.host() > last-0.05 {
			break
		}
		last = of.host()
	}
	return of, nil
}

// A footprint is what a sandbox' processes take of the host, in MiB: the
// proportional set sizes by role, without the guest's memory, which is counted by
// itself.
type footprint struct {
	roles map[string]float64
	image float64 // of the host's: the guest's kernel and initramfs, which QEMU maps and all sandboxes share
	guest float64
}

func (f footprint) host() (sum float64) {
	for _, mib := range f.roles {
		sum += mib
	}
	return sum
}

func (f footprint) add(res *results, limit float64) {
	for _, role := range slices.Sorted(maps.Keys(f.roles)) {
		r := result{Name: "memory (PSS) of " + role, Value: f.roles[role], Unit: "MiB"}
		if role == "shim" {
			r.AtMost = 20
		}
		res.add(r)
	}
	res.add(result{Name: "memory (PSS) of all of them", Value: f.host(), Unit: "MiB", AtMost: limit})
	res.add(result{Name: "of which the mapped kernel and initramfs", Value: f.image, Unit: "MiB"})
	res.add(result{Name: "memory of the guest that has been touched", Value: f.guest, Unit: "MiB"})
}

// memoryOf looks at a sandbox.
func (r *rig) memoryOf(st *sandbox.State) (footprint, error) {
	f := footprint{roles: map[string]float64{}}
	err := eachProcess(st, func(role string, pid int) error {
		own, image, guest, err := r.shares(pid)
		f.roles[role] += own + image
		f.image += image
		f.guest += guest
		return err
	})
	return f, err
}

// eachProcess calls do with all processes of a sandbox, the children of its helpers
// too: virtiofsd is two processes.
func eachProcess(st *sandbox.State, do func(role string, pid int) error) error {
	errs := []error{do("shim", st.Shim.PID)}
	for _, c := range st.Containers {
		errs = append(errs, do("task process", c.Task.PID))
	}
	for _, p := range st.Processes {
		errs = append(errs, do(p.Role, p.PID))
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.PID, p.PID))
		errs = append(errs, err)
		for child := range strings.FieldsSeq(string(children)) {
			pid, err := strconv.Atoi(child)
			errs = append(errs, err, do(p.Role, pid))
		}
	}
	return errors.Join(errs...)
}

// shares are a process' proportional set sizes: of the guest's memory, of its
// image, and of everything else.
func (r *rig) shares(pid int) (own, image, guest float64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, 0, 0, err
	}
	defer f.Close()
	to := &own
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		switch rest, is := strings.CutPrefix(line, "Pss:"); {
		case is:
			var kib float64
			if _, err := fmt.Sscan(rest, &kib); err != nil {
				return 0, 0, 0, err
			}
			*to += kib / 1024
		case strings.Contains(line, guestMapping):
			to = &guest
		case strings.HasSuffix(line, r.local.Kernel()), strings.HasSuffix(line, r.local.Initrd()):
			to = &image
		case mappingLine.MatchString(line):
			to = &own
		}
	}
	return own, image, guest, lines.Err()
}

// guestMapping is how the kernel shows the guest's memory, by the beginning of the
// names that QEMU and the shim give its file; mappingLine begins what smaps(5) has
// of a mapping.
const guestMapping = "memfd:memory"

var mappingLine = regexp.MustCompile(`^[0-9a-f]+-[0-9a-f]+ `)

// pss is a process' proportional set size, whatever it maps.
func pss(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	return field(string(text), "Pss:")
}

// guestMemory is what the guest does not offer to its containers.
func (c *container) guestMemory(ctx context.Context) (float64, error) {
	p, err := c.exec(ctx, "head", "-n", "3", "/proc/meminfo")
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 4<<10)
	n, err := p.stdout.Read(buf)
	if err != nil {
		return 0, err
	}
	total, terr := field(string(buf[:n]), "MemTotal:")
	available, aerr := field(string(buf[:n]), "MemAvailable:")
	return total - available, errors.Join(terr, aerr, p.end(ctx))
}

// field finds a line like "Pss:  123 kB" and returns MiB.
func field(text, name string) (float64, error) {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			var kib float64
			_, err := fmt.Sscan(rest, &kib)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no %q in %q", name, text)
}
