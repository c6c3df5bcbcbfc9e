package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/storage"
)

// reapTimeout is what Reap has: containerd gives a cleanup five seconds.
const reapTimeout = 4500 * time.Millisecond

// Reap cleans up after a sandbox whose shim is gone: it reads the state file
// in dir, kills every process named there by pid and start time and every
// other one that carries the sandbox's mark in its environment, removes
// mounts, cgroups, namespaces and files. It never calls the agent. A dir that
// does not exist is success.
func Reap(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	st, err := ReadState(dir)
	if err != nil {
		// Never written, or not by a version that we know: the marks remain.
		if !errors.Is(err, os.ErrNotExist) {
			log.G(ctx).WithError(err).Warn("cleaning up without the state file")
		}
		st = &State{}
	}
	ns := reapNetwork(ctx, st)
	errs := []error{reapProcesses(ctx, dir, st)}
	if ns != nil {
		errs = append(errs, ns.Detach(st.Network.Model, st.Network.Links...), ns.Close())
	}
	reapHooks(ctx, st)
	errs = append(errs,
		storage.RemoveShare(filepath.Join(dir, "share")),
		storage.Unmount(dir),
		removeCgroup(ctx, st.Cgroup),
	)
	if err := errors.Join(errs...); err != nil {
		// Files stay, for the next attempt.
		return fmt.Errorf("reap sandbox in %s: %w", dir, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("reap sandbox: %w", err)
	}
	return nil
}

// reapProcesses kills, the shim first: it must not start or clean up anything
// beside us. What was started in the meantime is found in the next round.
func reapProcesses(ctx context.Context, dir string, st *State) error {
	var errs []error
	if st.Shim.PID != 0 {
		errs = append(errs, killAll(ctx, []hypervisor.Process{st.Shim}))
	}
	named := slices.Clone(st.Processes)
	for _, c := range st.Containers {
		if c.Task.PID != 0 {
			named = append(named, c.Task)
		}
	}
	for {
		found, err := marked(dir)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		victims := slices.DeleteFunc(append(named, found...), func(p hypervisor.Process) bool {
			return p.PID == os.Getpid() || !alive(p)
		})
		if len(victims) == 0 {
			return errors.Join(errs...)
		}
		if err := killAll(ctx, victims); err != nil {
			return errors.Join(append(errs, err)...)
		}
		if ctx.Err() != nil {
			return errors.Join(append(errs, context.Cause(ctx))...)
		}
		named = nil
	}
}

// reapHooks runs the hooks of the end, for containers whose other hooks ran:
// networks for one are given back by them.
func reapHooks(ctx context.Context, st *State) {
	for id, c := range st.Containers {
		if !c.Hooked {
			continue
		}
		ctx := log.WithLogger(ctx, log.G(ctx).WithField("container_id", id))
		spec, err := readSpec(c.Bundle)
		if err != nil {
			log.G(ctx).WithError(err).Warn("poststop hooks are not run")
			continue
		}
		if spec.Hooks != nil {
			tryHooks(ctx, "poststop", spec.Hooks.Poststop, hookState(spec, id, c.Bundle, specs.StateStopped, 0), reapTimeout)
		}
	}
}

func readSpec(bundle string) (*specs.Spec, error) {
	b, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, err
	}
	return &spec, nil
}
