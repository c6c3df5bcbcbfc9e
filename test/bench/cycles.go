package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmshim/vmshim/test/ociimage"
)

// A census counts what containers could leave behind.
type census struct{ processes, mounts, files, cgroups int }

// cycle creates, starts, kills and deletes containers, and counts before and
// after. The first ones are not counted: they make what stays by design.
func (r *rig) cycle(ctx context.Context, res *results, n int) error {
	const first = 2
	if n <= first {
		return nil
	}
	var before census
	var began time.Time
	for i := range n {
		if i == first {
			before, began = r.count(), time.Now()
		}
		if err := r.once(ctx); err != nil {
			return fmt.Errorf("container %d: %w", i+1, err)
		}
		if i%20 == 19 {
			fmt.Fprintf(os.Stderr, "  %d of %d containers\n", i+1, n)
		}
	}
	took := time.Since(began)
	after := r.count()
	for end := time.Now().Add(5 * time.Second); after != before && time.Now().Before(end); after = r.count() {
		time.Sleep(50 * time.Millisecond) // nobody says when the last shim has gone
	}
	res.add(result{Name: fmt.Sprintf("one of %d cycles of create, start, kill, delete", n), Value: took.Seconds() * 1000 / float64(n-first), Unit: "ms"})
	for _, growth := range []struct {
		what          string
		before, after int
	}{
		{"processes", before.processes, after.processes},
		{"mounts", before.mounts, after.mounts},
		{"files", before.files, after.files},
		{"control groups", before.cgroups, after.cgroups},
	} {
		res.add(result{Name: growth.what + " that the cycles left", Value: float64(growth.after - growth.before), None: true})
	}
	return nil
}

func (r *rig) once(ctx context.Context) error {
	id := r.id()
	if out, err := r.Ctr(ctx, "run", "--detach", "--runtime", machineRuntime, ociimage.Name, id, "sleep", "100000").CombinedOutput(); err != nil {
		return fmt.Errorf("run: %w: %s", err, out)
	}
	return (&container{id: id, r: r}).discard(ctx)
}

func (r *rig) count() census {
	var c census
	processes, _ := r.Processes()
	c.processes = len(processes)
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	c.mounts = strings.Count(string(mounts), r.local.Dir+"/")
	for _, dir := range []string{r.local.StateDir(), filepath.Dir(r.Bundle("x")), "/run/containerd/s", "/run/containerd/fifo"} {
		c.files += tree(dir)
	}
	c.cgroups = cgroups()
	return c
}

// tree counts the files below a directory.
func tree(dir string) (n int) {
	_ = filepath.WalkDir(dir, func(string, os.DirEntry, error) error {
		n++
		return nil
	})
	return n
}

// cgroups counts the control groups of ctr's default namespace, in both
// versions of the hierarchy.
func cgroups() (n int) {
	for _, pattern := range []string{"/sys/fs/cgroup/default/*/", "/sys/fs/cgroup/*/default/*/"} {
		dirs, _ := filepath.Glob(pattern)
		n += len(dirs)
	}
	return n
}
