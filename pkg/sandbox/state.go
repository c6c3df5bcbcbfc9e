package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// StateVersion is the version of the state file that is written. Readers
// accept the one before as well: a newer program cleans up after an older one.
const StateVersion = 1

const (
	stateName    = "state.json"
	stateTmpName = "state.tmp"
	maxState     = 16 << 20
)

// State is what a later process must know to find everything of a sandbox, and
// what the operator's command shows. It is in the file state.json of the
// sandbox's directory, and always whole: it is replaced, never written over.
type State struct {
	Version   int    `json:"version"`
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	Address   string `json:"address"`
	// Agent is the address of the guest's agent, once the machine runs.
	Agent string `json:"agent,omitempty"`
	// Ready says that the guest has the sandbox.
	Ready bool `json:"ready"`
	// VCPUs and MemoryMiB are the machine's.
	VCPUs     int `json:"vcpus,omitempty"`
	MemoryMiB int `json:"memory_mib,omitempty"`
	// Shim is the process that owns the sandbox, Processes are the machine's.
	Shim       hypervisor.Process        `json:"shim"`
	Processes  []hypervisor.Process      `json:"processes,omitempty"`
	Network    *NetworkState             `json:"network,omitempty"`
	Cgroup     *CgroupState              `json:"cgroup,omitempty"`
	Containers map[string]ContainerState `json:"containers,omitempty"`
	Timeline   []Phase                   `json:"timeline,omitempty"`
}

// ContainerState is a container's part.
type ContainerState struct {
	Bundle string             `json:"bundle"`
	Task   hypervisor.Process `json:"task,omitzero"`
	// Hooked says that hooks ran: those of its end must run as well.
	Hooked  bool      `json:"hooked,omitempty"`
	Created time.Time `json:"created,omitzero"`
}

// Alive says whether the process that owns the sandbox still runs.
func (s *State) Alive() bool { return alive(s.Shim) }

// ReadState reads the state of the sandbox in dir.
func ReadState(dir string) (*State, error) {
	path := filepath.Join(dir, stateName)
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	if info.Size() > maxState {
		return nil, fmt.Errorf("read state: %s has %d bytes: %w", path, info.Size(), errdefs.ErrDataLoss)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	st, err := parseState(b)
	if err != nil {
		return nil, fmt.Errorf("read state: %s: %w", path, err)
	}
	return st, nil
}

func parseState(b []byte) (*State, error) {
	var st State
	if err := json.Unmarshal(b, &st); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if st.Version < 1 || st.Version > StateVersion {
		return nil, fmt.Errorf("version %d, not 1 to %d: %w", st.Version, StateVersion, errdefs.ErrNotImplemented)
	}
	return &st, nil
}

// Dirs lists the directories of the sandboxes below root.
func Dirs(root string) ([]string, error) {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() && len(e.Name()) == 16 && strings.Trim(e.Name(), "0123456789abcdef") == "" {
			dirs = append(dirs, filepath.Join(root, e.Name()))
		}
	}
	return dirs, nil
}

// A store is the state of this process' sandbox and its file.
type store struct {
	dir string

	// turn serialises writers of the file, so that the last one wins. Nobody
	// but writers waits for it.
	turn sync.Mutex

	mu    sync.Mutex
	state State // guarded by mu
	there bool  // guarded by mu: the file may be written
}

func newStore(opts Options) *store {
	return &store{
		dir: opts.Dir,
		state: State{
			Version: StateVersion, ID: opts.ID, Namespace: opts.Namespace, Address: opts.Address,
			Timeline: []Phase{{PhaseShim, opts.Began}},
		},
	}
}

// open writes the first state.
func (st *store) open() error {
	self, err := processOf("shim", os.Getpid())
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	st.mu.Lock()
	st.there = true
	st.mu.Unlock()
	return st.update(func(s *State) { s.Shim = self })
}

// close ends writing: the file is about to be removed.
func (st *store) close() {
	st.turn.Lock()
	defer st.turn.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.there = false
}

// update changes the state and writes the file. When writing fails, the change
// is kept for the next time.
func (st *store) update(change func(*State)) error {
	st.mu.Lock()
	change(&st.state)
	st.mu.Unlock()

	st.turn.Lock()
	defer st.turn.Unlock()
	b, err := st.encode()
	if err != nil || b == nil {
		return err
	}
	if err := replace(st.dir, b); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

func (st *store) encode() ([]byte, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.there {
		return nil, nil
	}
	return json.MarshalIndent(st.state, "", "\t")
}

// replace puts the file in place whole. It is not synced: nothing of it is of
// use after a power cut.
func replace(dir string, b []byte) error {
	tmp := filepath.Join(dir, stateTmpName)
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(err, removeFile(tmp))
	}
	if err := os.Rename(tmp, filepath.Join(dir, stateName)); err != nil {
		return errors.Join(err, removeFile(tmp))
	}
	return nil
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// snapshot is a copy for reading.
func (st *store) snapshot() State {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := st.state
	s.Processes = slices.Clone(s.Processes)
	s.Containers = maps.Clone(s.Containers)
	s.Timeline = slices.Clone(s.Timeline)
	return s
}

// container changes one container's part.
func (st *store) container(id string, change func(*ContainerState)) error {
	return st.update(func(s *State) {
		c := s.Containers[id]
		change(&c)
		if s.Containers == nil {
			s.Containers = map[string]ContainerState{}
		}
		s.Containers[id] = c
	})
}

// process records a process of the machine.
func (st *store) process(p hypervisor.Process) error {
	return st.update(func(s *State) { s.Processes = append(s.Processes, p) })
}

// mark adds to the time line; the first time of a phase counts. It is for
// people: a failure is logged.
func (st *store) mark(ctx context.Context, phase string, at time.Time) {
	known := func(s *State) bool {
		return slices.ContainsFunc(s.Timeline, func(p Phase) bool { return p.Name == phase })
	}
	if now := st.snapshot(); known(&now) {
		return
	}
	err := st.update(func(s *State) {
		if !known(s) {
			s.Timeline = append(s.Timeline, Phase{phase, at})
		}
	})
	if err != nil {
		log.G(ctx).WithError(err).Warn("time line is not recorded")
	}
}
