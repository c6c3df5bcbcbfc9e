package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
)

// Hooks of the guest: programs in a directory of it, which the host names and
// every container gets, behind those of its specification. They run in the
// guest's namespaces, but for createContainer, which runs in the container's
// before that has its root.

// guestHookTimeout bounds a program that has no timeout of its own.
const guestHookTimeout = 30 * time.Second

// findHooks lists the programs in the directories of a directory that are called
// like the stages, in the order of their names.
func findHooks(dir string) (configs.Hooks, error) {
	if dir == "" {
		return nil, nil
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return nil, invalid("guest hooks: no directory %s", bound(dir, 512))
	}
	hooks := configs.Hooks{}
	for _, stage := range []configs.HookName{
		configs.Prestart, configs.CreateRuntime, configs.CreateContainer,
		configs.StartContainer, configs.Poststart, configs.Poststop,
	} {
		entries, err := os.ReadDir(filepath.Join(dir, string(stage)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("guest hooks: %w", err)
		}
		for _, e := range entries {
			path := filepath.Join(dir, string(stage), e.Name())
			info, err := os.Stat(path)
			if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
				continue
			}
			hooks[stage] = append(hooks[stage], configs.NewCommandHook(&configs.Command{
				Path: path, Args: []string{path}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
				Timeout: new(guestHookTimeout),
			}))
		}
	}
	return hooks, nil
}

// splitHooks gives libcontainer, whose hooks those of the specification are, the
// guest's, and returns those that start runs: libcontainer would look for the
// guest's startContainer hooks in the container, and calls poststart before
// there is anything to be after.
func splitHooks(spec, guest configs.Hooks) (own configs.Hooks) {
	own = configs.Hooks{configs.StartContainer: guest[configs.StartContainer]}
	for stage, list := range guest {
		if stage != configs.StartContainer {
			spec[stage] = append(spec[stage], list...)
		}
	}
	own[configs.Poststart] = spec[configs.Poststart]
	delete(spec, configs.Poststart)
	return own
}

// runHooks holds the op lock.
func (c *container) runHooks(stage configs.HookName) error {
	if len(c.hooks[stage]) == 0 {
		return nil
	}
	state, err := c.lib.OCIState()
	if err != nil {
		return fmt.Errorf("state of container %q: %w", c.id, err)
	}
	if err := c.hooks.Run(stage, state); err != nil {
		return fmt.Errorf("container %q: %w", c.id, err)
	}
	return nil
}
