package main

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// execs runs many processes in one container, and looks at its shim before
// and after.
func (r *rig) execs(ctx context.Context, res *results, n int) (err error) {
	c, err := r.launch(ctx, machineRuntime)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove(ctx)) }()
	st, err := r.state(c.id)
	if err != nil {
		return err
	}
	var before, after float64
	var filesBefore, filesAfter int
	for i := range n {
		if i == n/10 { // what is kept by design is there now
			if filesBefore, before, err = consumption(st.Shim.PID); err != nil {
				return err
			}
		}
		if _, err := c.execTime(ctx); err != nil {
			return fmt.Errorf("process %d: %w", i+1, err)
		}
	}
	if filesAfter, after, err = consumption(st.Shim.PID); err != nil {
		return err
	}
	res.add(result{Name: fmt.Sprintf("open files that %d execs left in the shim", n), Value: float64(filesAfter - filesBefore), None: true})
	res.add(result{Name: fmt.Sprintf("memory that %d execs left in the shim", n), Value: after - before, Unit: "MiB", AtMost: 2})
	return nil
}

// consumption is how many files a process has open, and its memory.
func consumption(pid int) (files int, mib float64, err error) {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return 0, 0, err
	}
	mib, err = pss(pid)
	return len(fds), mib, err
}
