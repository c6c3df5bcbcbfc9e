package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// exec measures from Exec to the first byte that the process says.
func (r *rig) exec(ctx context.Context, res *results) (err error) {
	times := map[string][]time.Duration{}
	runtimes := []string{runcRuntime, machineRuntime}
	var cs []*container
	defer func() {
		for _, c := range cs {
			err = errors.Join(err, c.remove(ctx))
		}
	}()
	for _, runtime := range runtimes {
		c, err := r.launch(ctx, runtime)
		if err != nil {
			return err
		}
		cs = append(cs, c)
	}
	for i := range 3*r.runs + 1 {
		for j, c := range cs {
			t, err := c.execTime(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", runtimes[j], err)
			}
			if i > 0 { // the first one warms up
				times[runtimes[j]] = append(times[runtimes[j]], t)
			}
		}
	}
	res.add(result{Name: "exec to first byte, runc", Value: median(times[runcRuntime]), Unit: "ms"})
	res.add(result{Name: "exec to first byte", Value: median(times[machineRuntime]), Unit: "ms", Against: "exec to first byte, runc", AtMost: r.target.exec})
	return nil
}

func (c *container) execTime(ctx context.Context) (time.Duration, error) {
	p, err := c.exec(ctx, "echo", "x")
	if err != nil {
		return 0, err
	}
	if err := p.says(ctx, 2); err != nil {
		return 0, err
	}
	t := time.Since(p.began)
	return t, p.end(ctx)
}
