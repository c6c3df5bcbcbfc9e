package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// settle is how long a shim has to become idle.
const settle = 5 * time.Second

// memory measures what an idle container takes on the host, process by
// process: its proportional set size, in which shared pages count in parts.
func (r *rig) memory(ctx context.Context, res *results) (err error) {
	c, err := r.launch(ctx, machineRuntime)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return ctx.Err()
	}
	st, err := r.state(c.id)
	if err != nil {
		return err
	}
	parts := []result{{Name: "shim", AtMost: 20}}
	pids := []int{st.Shim.PID}
	for _, p := range st.Processes {
		parts, pids = append(parts, result{Name: p.Role}), append(pids, p.PID)
	}
	parts, pids = append(parts, result{Name: "task process"}), append(pids, st.Containers[c.id].Task.PID)
	for i, part := range parts {
		part.Name, part.Unit = "memory (PSS) of "+part.Name, "MiB"
		if part.Value, err = pss(pids[i]); err != nil {
			return err
		}
		if part.AtMost == 0 { // the shim's children are the other parts
			children, err := childrenPSS(pids[i])
			if err != nil {
				return err
			}
			part.Value += children
		}
		res.add(part)
	}
	used, err := c.guestMemory(ctx)
	if err != nil {
		return err
	}
	res.add(result{Name: "memory that the guest uses itself", Value: used, Unit: "MiB"})
	a, err := c.connect()
	if err != nil {
		return err
	}
	defer a.Disconnect() //nolint:errcheck // nothing is under way
	_, used, err = agentUse(ctx, a)
	res.add(result{Name: "memory (RSS) of the agent in the guest", Value: used, Unit: "MiB", AtMost: 16})
	return err
}

// pss is a process' proportional set size.
func pss(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	return field(string(text), "Pss:")
}

// childrenPSS is that of a helper's own processes: virtiofsd is two.
func childrenPSS(pid int) (sum float64, _ error) {
	pids, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0, err
	}
	for child := range strings.FieldsSeq(string(pids)) {
		pid, err := strconv.Atoi(child)
		if err != nil {
			return 0, err
		}
		mib, err := pss(pid)
		if err != nil {
			return 0, err
		}
		sum += mib
	}
	return sum, nil
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
