// Package config is the one configuration file: strict TOML, a default in code
// for every key, annotations from an allow-list. It only assembles what the
// packages that own the settings declare.
//
// The order is: default, then the file, then what containerd sends as runtime
// options, then annotations of the spec that the file allows.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// Path is where the file is read from when nothing else is said.
const Path = "/etc/vmshim/config.toml"

// Env names another file, for everything that the daemon starts.
const Env = "VMSHIM_CONFIG"

// Config is the effective configuration.
//
// To add a setting: a key with its default in file.go, its place in apply, a
// check in Validate, and a line each in configs/config.toml and
// docs/configuration.md (tests compare them). To remove one: move its key to
// the graveyard in removed.go, where it stays for one release.
type Config struct {
	StateDir string // root of the sandboxes' directories
	Debug    bool
	QEMU     qemu.Config
	Sandbox  sandbox.Config
	// Annotations of a spec that may change a setting, by name; none by default.
	Annotations []string
	// Warnings are for the log: keys that no longer mean anything.
	Warnings []string
}

// Default is the configuration without a file. The paths of the guest image
// are empty; Load and Parse fill them in.
func Default() Config { return defaults().config() }

// Load reads the file at path; empty: Env, then Path, then defaults when there
// is no file at Path. An unknown key is an error with file and line.
func Load(path string) (Config, error) {
	if path == "" {
		path = os.Getenv(Env)
	}
	optional := path == ""
	if optional {
		path = Path
	}
	text, err := os.ReadFile(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		text, err = nil, nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return Parse(path, text)
}

// Parse is Load for the text of a file (containerd can send one); name stands
// for it in errors.
func Parse(name string, text []byte) (Config, error) {
	f, warnings, err := decode(name, text, removed)
	if err != nil {
		return Config{}, err
	}
	c := f.config()
	c.Warnings = warnings
	if err := c.findImage(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// findImage fills in the guest image that is installed beside this program:
// PREFIX/bin/containerd-shim-vm-v2 goes with PREFIX/share/vmshim/.
func (c *Config) findImage() error {
	m := &c.Sandbox.Machine
	if m.Kernel != "" && m.Initrd != "" {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	share := filepath.Join(filepath.Dir(filepath.Dir(self)), "share", "vmshim")
	if m.Kernel == "" {
		m.Kernel = filepath.Join(share, "vmlinux")
	}
	if m.Initrd == "" {
		m.Initrd = filepath.Join(share, "initrd.img")
	}
	return nil
}

// Validate reports every fault at once. It does not look at the host: whether
// a path exists is found out by its user, and by 'vmshim check'.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !filepath.IsAbs(c.StateDir) {
		bad("state_dir %q is not an absolute path", c.StateDir)
	}
	// sun_path has 108 bytes: the root, a slash, 16 digits, a slash, 12 bytes and a zero.
	if most := 108 - 31; len(c.StateDir) > most {
		bad("state_dir %q is longer than %d bytes, which socket paths below it do not allow", c.StateDir, most)
	}
	if dir := c.QEMU.TemplateDir; dir != "" && !filepath.IsAbs(dir) {
		bad("template_dir %q is not an absolute path", dir)
	}
	for _, name := range c.Annotations {
		if _, ok := annotations[name]; !ok {
			bad("annotations: %q names no setting (there are %v)", name, annotationNames())
		}
	}
	if err := c.machine().Validate(); err != nil {
		bad("machine: %w", err)
	}
	errs = append(errs, validateQEMU(c.QEMU)...)
	if err := c.Sandbox.Network.Validate(); err != nil {
		bad("network: %w", err)
	}
	for key, d := range map[string]time.Duration{
		"start": c.Sandbox.StartTimeout, "stop": c.Sandbox.StopTimeout,
		"request": c.Sandbox.RequestTimeout, "hook": c.Sandbox.HookTimeout,
	} {
		if d <= 0 {
			bad("timeouts.%s %v is not positive", key, d)
		}
	}
	return errors.Join(errs...)
}

// machine is the base with names that only a sandbox has, so that the rest
// can be checked.
func (c Config) machine() hypervisor.Spec {
	m := c.Sandbox.Machine
	m.Name, m.Arch = "check", "amd64"
	if m.Kernel == "" {
		m.Kernel = "/"
	}
	if m.Initrd == "" {
		m.Initrd = "/"
	}
	return m
}

func validateQEMU(q qemu.Config) (errs []error) {
	for _, s := range []struct {
		key, value string
		of         []string
	}{
		{"qemu.accelerator", q.Accelerator, []string{"auto", "kvm", "tcg"}},
		{"qemu.vsock", q.Vsock, []string{"auto", "kernel", "vhost-user"}},
		{"qemu.virtiofsd_cache", q.VirtiofsdCache, []string{"auto", "always", "never"}},
		{"make_templates", q.MakeTemplates, []string{qemu.MakeEmulated, qemu.MakeAlways, qemu.MakeNever}},
	} {
		if !slices.Contains(s.of, s.value) {
			errs = append(errs, fmt.Errorf("%s %q is not one of %q", s.key, s.value, s.of))
		}
	}
	for _, s := range []struct{ key, path string }{
		{"path", q.Path}, {"vhost_device_vsock", q.VhostDeviceVsock}, {"virtiofsd", q.Virtiofsd},
	} {
		if s.path != "" && !filepath.IsAbs(s.path) {
			errs = append(errs, fmt.Errorf("qemu.%s %q is not an absolute path", s.key, s.path))
		}
	}
	// Up to 4194304 pids are added to it, and -1 means "no change" to the kernel.
	if most := uint32(1<<32 - 1<<22 - 2); q.UIDBase > most {
		errs = append(errs, fmt.Errorf("qemu.uid_base %d is greater than %d", q.UIDBase, most))
	}
	return errs
}

// arch is the architecture of the guest: the host's.
func arch() string { return runtime.GOARCH }
