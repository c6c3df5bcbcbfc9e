package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/vmshim/vmshim/pkg/agent"
)

// execs runs many processes in one container, first one by one, then many at
// once, and looks at its shim and its agent before and after.
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
	a, err := c.connect()
	if err != nil {
		return err
	}
	defer a.Disconnect() //nolint:errcheck // nothing is under way
	var before, after use
	var times []time.Duration
	for i := range n {
		if i == n/10 { // what is kept by design is there now
			if before, err = usage(ctx, st.Shim.PID, a); err != nil {
				return err
			}
		}
		t, err := c.execTime(ctx)
		if err != nil {
			return fmt.Errorf("process %d: %w", i+1, err)
		}
		times = append(times, t)
		if i%100 == 99 {
			fmt.Fprintf(os.Stderr, "  %d of %d processes\n", i+1, n)
		}
	}
	if after, err = usage(ctx, st.Shim.PID, a); err != nil {
		return err
	}
	first := fmt.Sprintf("exec to first byte, the first %d", n/10)
	res.add(result{Name: first, Value: median(times[:n/10]), Unit: "ms"})
	res.add(result{Name: fmt.Sprintf("exec to first byte, all %d", n), Value: median(times), Unit: "ms", Against: first, AtMost: 1.1})
	after.minus(before).add(res, fmt.Sprintf("%d execs", n))

	lost, err := c.crowd(ctx)
	if err != nil {
		return err
	}
	res.add(result{Name: fmt.Sprintf("bytes lost of %d execs at once, 1 MiB each", crowd), Value: float64(lost), None: true})
	return nil
}

// crowd is how many processes run at once.
const crowd = 64

// crowd runs them, and returns how much of their output did not come.
func (c *container) crowd(ctx context.Context) (lost int64, err error) {
	const each = 1 << 20
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var group errgroup.Group
	var came atomic.Int64
	for range crowd {
		group.Go(func() error {
			p, err := c.exec(ctx, "dd", "if=/dev/zero", "bs=32k", "count=32")
			if err != nil {
				return err
			}
			n, err := io.Copy(io.Discard, io.LimitReader(p.stdout, each))
			came.Add(n)
			return errors.Join(err, p.end(ctx))
		})
	}
	err = group.Wait()
	return crowd*each - came.Load(), err
}

// A use is what shim and agent take.
type use struct {
	shimFiles, agentFiles int
	shimMiB, agentMiB     float64
}

func usage(ctx context.Context, shim int, a agent.Guest) (u use, err error) {
	if u.shimFiles, u.shimMiB, err = consumption(shim); err != nil {
		return u, err
	}
	u.agentFiles, u.agentMiB, err = agentUse(ctx, a)
	return u, err
}

func (u use) minus(v use) use {
	return use{u.shimFiles - v.shimFiles, u.agentFiles - v.agentFiles, u.shimMiB - v.shimMiB, u.agentMiB - v.agentMiB}
}

func (u use) add(res *results, by string) {
	res.add(result{Name: "open files that " + by + " left in the shim", Value: float64(u.shimFiles), None: true})
	res.add(result{Name: "open files that " + by + " left in the agent", Value: float64(u.agentFiles), None: true})
	res.add(result{Name: "memory that " + by + " left in the shim", Value: u.shimMiB, Unit: "MiB", AtMost: 2})
	res.add(result{Name: "memory that " + by + " left in the agent", Value: u.agentMiB, Unit: "MiB", AtMost: 2})
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
