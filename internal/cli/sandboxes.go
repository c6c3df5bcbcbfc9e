package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// An entry is a sandbox's directory and what its state file says.
type entry struct {
	Dir   string         `json:"dir"`
	Alive bool           `json:"alive"` // its shim runs
	State *sandbox.State `json:"state,omitempty"`
	Fault string         `json:"fault,omitempty"` // why there is no state
}

// name is what a person calls the sandbox when its id is not enough.
func (e entry) name() string { return filepath.Base(e.Dir) }

// is says whether id means this sandbox.
func (e entry) is(id string) bool {
	if id == e.name() || e.State == nil {
		return id == e.name()
	}
	_, member := e.State.Containers[id]
	return member || id == e.State.ID
}

// entries reads every sandbox below the state directory, sorted by id.
func (c *call) entries() ([]entry, error) {
	cfg, err := config.Load(c.configPath)
	if err != nil {
		return nil, err
	}
	dirs, err := sandbox.Dirs(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	all := []entry{} // JSON: a list, even when it is empty
	for _, dir := range dirs {
		e := entry{Dir: dir}
		switch st, err := sandbox.ReadState(dir); {
		case errors.Is(err, fs.ErrNotExist):
			continue // just being made or removed
		case err != nil:
			e.Fault = err.Error()
		default:
			e.State, e.Alive = st, st.Alive()
		}
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.key(), b.key()) })
	return all, nil
}

func (e entry) key() string {
	if e.State == nil {
		return e.name()
	}
	return e.State.Namespace + "/" + e.State.ID
}

// one finds the sandbox that the operand means.
func (c *call) one() (entry, error) {
	all, err := c.entries()
	if err != nil {
		return entry{}, err
	}
	id := c.operands[0]
	all = slices.DeleteFunc(all, func(e entry) bool { return !e.is(id) })
	switch {
	case len(all) == 0:
		return entry{}, fmt.Errorf("sandbox %q: %w", id, errdefs.ErrNotFound)
	case len(all) > 1: // ids are unique in a namespace of one daemon only
		var names []string
		for _, e := range all {
			names = append(names, fmt.Sprintf("%s (%s)", e.name(), e.key()))
		}
		return entry{}, fmt.Errorf("%q may be %s: say which", id, strings.Join(names, " or "))
	case all[0].State == nil:
		return entry{}, errors.New(all[0].Fault)
	}
	return all[0], nil
}

func (e entry) containers() []string { return slices.Sorted(maps.Keys(e.State.Containers)) }
