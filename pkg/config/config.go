// Package config is the one configuration file: strict TOML, a default in code
// for every key, annotations from an allow-list. It only assembles what the
// packages that own the settings declare.
package config

import (
	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// Path is where the file is read from when nothing else is said.
const Path = "/etc/vmshim/config.toml"

// Env names another file, for everything that the daemon starts.
const Env = "VMSHIM_CONFIG"

// Config is the effective configuration.
type Config struct {
	StateDir string // root of the sandboxes' directories
	Debug    bool
	QEMU     qemu.Config
	Sandbox  sandbox.Config
	// Annotations of a spec that may change a setting, by name; none by default.
	Annotations []string
}

// Default is the configuration without a file.
func Default() Config { return Config{} }

// Load reads the file at path; empty: Env, then Path, then defaults when there
// is no file at Path. An unknown key is an error with file and line.
func Load(path string) (Config, error) { return Config{}, errdefs.ErrNotImplemented }

// Parse is Load for the text of a file (containerd can send one); name stands
// for it in errors.
func Parse(name string, text []byte) (Config, error) { return Config{}, errdefs.ErrNotImplemented }

// Annotate applies the annotations of a spec. One that names a setting but is
// not allowed is an error (errdefs.ErrPermissionDenied).
func (c Config) Annotate(annotations map[string]string) (Config, error) { return c, nil }
