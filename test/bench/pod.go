package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// pod measures the start of a pod, by the annotations of CRI, and of one more
// container in it, against runc's. They take turns.
func (r *rig) pod(ctx context.Context, res *results) error {
	pods, seconds := map[string][]time.Duration{}, map[string][]time.Duration{}
	for range r.runs {
		for _, runtime := range []string{runcRuntime, machineRuntime} {
			pod, second, err := r.onePod(ctx, runtime)
			if err != nil {
				return fmt.Errorf("%s: %w", runtime, err)
			}
			pods[runtime], seconds[runtime] = append(pods[runtime], pod), append(seconds[runtime], second)
		}
	}
	for _, m := range []struct {
		name  string
		times map[string][]time.Duration
		most  float64
	}{
		{"ctr run of a pod", pods, 0},
		{"ctr run to first byte, second container of a pod", seconds, r.target.second},
	} {
		res.add(result{Name: m.name + ", runc", Value: median(m.times[runcRuntime]), Unit: "ms"})
		res.add(result{Name: m.name, Value: median(m.times[machineRuntime]), Unit: "ms", Against: m.name + ", runc", AtMost: m.most})
	}
	return nil
}

// onePod is how long the start of a pod takes, and that of its second container.
func (r *rig) onePod(ctx context.Context, runtime string) (pod, second time.Duration, err error) {
	began := time.Now()
	stand, err := r.launch(ctx, runtime, inPod("sandbox", r.next())...)
	if err != nil {
		return 0, 0, err
	}
	pod = time.Since(began)
	defer func() { err = errors.Join(err, stand.remove(ctx)) }()
	member := inPod("container", stand.id)
	_, err = r.firstWord(ctx, runtime, func(string) (err error) {
		second, err = r.firstWord(ctx, runtime, nil, member...)
		return err
	}, member...)
	return pod, second, err
}

func inPod(kind, sandbox string) []string {
	return []string{
		"--annotation", "io.kubernetes.cri.container-type=" + kind, "--annotation", "io.kubernetes.cri.sandbox-id=" + sandbox,
	}
}
