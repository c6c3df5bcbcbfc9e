package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// together starts sandboxes at once, sees that each of them runs, and looks at
// what they take.
func (r *rig) together(ctx context.Context, res *results, n int) (err error) {
	if n == 0 {
		return nil
	}
	var mu sync.Mutex
	var all []*container // guarded by mu
	defer func() {
		for _, c := range all {
			err = errors.Join(err, c.remove(ctx))
		}
	}()
	var group errgroup.Group
	began := time.Now()
	for range n {
		group.Go(func() error {
			c, err := r.launch(ctx, machineRuntime)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, c)
			fmt.Fprintf(os.Stderr, "  %d of %d sandboxes run after %.0f s\n", len(all), n, time.Since(began).Seconds())
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	took := time.Since(began)
	cids := map[string]bool{}
	var host, guest float64
	for _, c := range all {
		if _, err := c.execTime(ctx); err != nil {
			return fmt.Errorf("%s: %w", c.id, err)
		}
		st, err := r.state(c.id)
		if err != nil {
			return err
		}
		f, err := r.memoryOf(st)
		if err != nil {
			return err
		}
		host, guest, cids[st.Agent] = host+f.host(), guest+f.guest, true
	}
	if len(cids) != n {
		return fmt.Errorf("%d sandboxes have %d agents", n, len(cids))
	}
	what := fmt.Sprintf(" of %d sandboxes at once", n)
	res.add(result{Name: "ctr run," + what[len(" of"):], Value: float64(took.Milliseconds()) / float64(n), Unit: "ms each"})
	res.add(result{Name: "memory (PSS) of the host's processes, each" + what, Value: host / float64(n), Unit: "MiB", AtMost: r.target.host})
	res.add(result{Name: "memory of the guest, each" + what, Value: guest / float64(n), Unit: "MiB"})
	return nil
}
