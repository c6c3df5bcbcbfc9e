package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

// idleWatch is how long an idle sandbox is watched: its guest's rarest timers
// (the kernel's watchdog) come every four seconds.
const idleWatch = 20 * time.Second

// idleTime measures what a container that does nothing takes of the host's
// processors, and how often it wakes them.
func (r *rig) idleTime(ctx context.Context, st *sandbox.State, res *results) error {
	began := time.Now()
	before, err := scheduledOf(st)
	if err != nil {
		return err
	}
	select {
	case <-time.After(idleWatch):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := scheduledOf(st)
	if err != nil {
		return err
	}
	seconds := time.Since(began).Seconds()
	res.add(result{
		Name: "processor time of an idle sandbox, each second", Unit: "ms",
		Value: float64(after.ran-before.ran) / float64(time.Millisecond) / seconds,
	})
	res.add(result{Name: "wake-ups of an idle sandbox, each second", Value: float64(after.times-before.times) / seconds})
	return nil
}

// scheduled is for how long and how often threads have run.
type scheduled struct {
	ran   time.Duration
	times int64
}

func scheduledOf(st *sandbox.State) (all scheduled, _ error) {
	err := eachProcess(st, func(_ string, pid int) error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		for _, thread := range threads {
			text, rerr := os.ReadFile(thread)
			if errors.Is(rerr, os.ErrNotExist) || errors.Is(rerr, unix.ESRCH) {
				continue // it has ended
			}
			var s scheduled
			var waited int64
			_, serr := fmt.Sscan(string(text), &s.ran, &waited, &s.times) // Documentation/scheduler/sched-stats.rst
			err = errors.Join(err, rerr, serr)
			all.ran += s.ran
			all.times += s.times
		}
		return err
	})
	return all, err
}
