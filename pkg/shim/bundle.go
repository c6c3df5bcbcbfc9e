package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	recordFile    = "vmshim.json"
	recordVersion = 1
	specFile      = "config.json"
	// sandboxFile is written by containerd 2.x into the bundle of a container
	// that it puts into a running sandbox without calling start.
	sandboxFile = "sandbox"
)

// A record is what the daemon leaves in each bundle for a later delete, which
// must find everything without asking anybody.
type record struct {
	Version int    `json:"version"`
	Sandbox string `json:"sandbox"`        // its id
	Dir     string `json:"dir,omitempty"`  // its directory; empty before the first Create
	Task    int    `json:"task,omitempty"` // the task pid
	Address string `json:"address"`        // of the daemon's own socket
	// PID and StartTime (field 22 of /proc/PID/stat) name the daemon for good.
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
}

func (r record) write(bundle string) error {
	r.Version = recordVersion
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	path := filepath.Join(bundle, recordFile)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

// leave puts into a bundle what a later delete, and containerd 1.6, need.
func (r record) leave(bundle string) error {
	if readAddress(bundle) == "" {
		if err := writeAddress(bundle, r.Address); err != nil {
			return err
		}
	}
	return r.write(bundle)
}

func readRecord(bundle string) (record, error) {
	var r record
	text, err := os.ReadFile(filepath.Join(bundle, recordFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return record{}, fmt.Errorf("decode record of %s: %w", bundle, err)
	}
	if r.Version > recordVersion {
		return record{}, fmt.Errorf("record of %s has version %d, newer than %d", bundle, r.Version, recordVersion)
	}
	return r, nil
}

// readSpec reads the container's specification.
func readSpec(bundle string) (*specs.Spec, error) {
	text, err := os.ReadFile(filepath.Join(bundle, specFile))
	if err != nil {
		return nil, fmt.Errorf("read spec: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(text, &spec); err != nil {
		return nil, fmt.Errorf("decode spec %s: %w", filepath.Join(bundle, specFile), err)
	}
	return &spec, nil
}

// kinds are the annotations by which the users of containerd and CRI-O say
// that a container belongs to a pod, and to which.
var kinds = []struct{ kind, sandbox string }{
	{"io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"},
	{"io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"},
}

// sandboxOf returns the id of the sandbox that a container goes to: its own
// id, unless its annotations say that it joins a pod.
func sandboxOf(annotations map[string]string, id string) string {
	for _, k := range kinds {
		if annotations[k.kind] == "container" && annotations[k.sandbox] != "" {
			return annotations[k.sandbox]
		}
	}
	return id
}

// standsForPod says that a container is the one that a pod begins and ends with.
func standsForPod(annotations map[string]string) bool {
	for _, k := range kinds {
		if annotations[k.kind] == "sandbox" {
			return true
		}
	}
	return false
}

// bundleSandbox is sandboxOf for a bundle on disk. A bundle without a
// specification is a sandbox of its own.
func bundleSandbox(bundle, id string) (string, error) {
	if text, err := os.ReadFile(filepath.Join(bundle, sandboxFile)); err == nil && len(text) > 0 {
		return strings.TrimSpace(string(text)), nil
	}
	spec, err := readSpec(bundle)
	if errors.Is(err, fs.ErrNotExist) {
		return id, nil
	}
	if err != nil {
		return "", err
	}
	return sandboxOf(spec.Annotations, id), nil
}
