package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fs2"
	"golang.org/x/sys/unix"
)

// cgroupParent holds the control groups of all containers. The path in a
// specification, which is the host's order of things, is not looked at.
const cgroupParent = "/vmshim"

// A cgroup is the control group of one container, as a directory.
type cgroup string

func containerCgroup(id string) cgroup {
	return cgroup(filepath.Join(fs2.UnifiedMountpoint, cgroupParent, id))
}

// name is what /proc calls it.
func (g cgroup) name() string { return strings.TrimPrefix(string(g), fs2.UnifiedMountpoint) }

func (g cgroup) file(name string) string { return filepath.Join(string(g), name) }

func (g cgroup) write(name, value string) error {
	f, err := os.OpenFile(g.file(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// kill kills every process in the group and below it, even frozen ones. Where
// there is no group there is no process.
func (g cgroup) kill() error {
	err := g.write("cgroup.kill", "1")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// pids lists the processes in the group and below it.
func (g cgroup) pids() ([]int, error) {
	pids, err := cgroups.GetAllPids(string(g))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	slices.Sort(pids)
	return pids, err
}

// oomKills says how many processes the kernel has killed for lack of memory.
func (g cgroup) oomKills() uint64 {
	events, err := g.keyed("memory.events")
	if err != nil {
		return 0
	}
	return events["oom_kill"]
}

// keyed reads a file of "key value" lines.
func (g cgroup) keyed(name string) (map[string]uint64, error) {
	b, err := os.ReadFile(g.file(name))
	if err != nil {
		return nil, err
	}
	return parseKeyed(string(b)), nil
}

func parseKeyed(text string) map[string]uint64 {
	values := map[string]uint64{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			values[key] = n
		}
	}
	return values
}

// freeze stops all processes of the group and waits until they stand still. If
// they do not in time they go on.
func (g cgroup) freeze(ctx context.Context, w *watcher) (err error) {
	changed := make(chan struct{}, 1)
	unwatch, err := w.add(g.file("cgroup.events"), func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return err
	}
	defer unwatch()
	if err := g.write("cgroup.freeze", "1"); err != nil {
		return err
	}
	for {
		events, err := g.keyed("cgroup.events")
		if err != nil {
			return err
		}
		if events["frozen"] == 1 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("wait for processes to freeze: %w", ctx.Err()), g.thaw())
		}
	}
}

func (g cgroup) thaw() error { return g.write("cgroup.freeze", "0") }

// frozen says whether a process born in the group would not run.
func (g cgroup) frozen() bool {
	b, err := os.ReadFile(g.file("cgroup.freeze"))
	return err == nil && strings.TrimSpace(string(b)) == "1"
}
