package config

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// AnnotationPrefix is common to all annotations that change a setting.
const AnnotationPrefix = "io.vmshim."

// annotations are the settings that a spec may change when the file allows
// it. What runs on the host (paths of programs, uids, the state directory) is
// not among them: whoever may write a pod may not choose those.
var annotations = map[string]func(*Config, string) error{
	AnnotationPrefix + "kernel": func(c *Config, v string) error {
		c.Sandbox.Machine.Kernel = v
		return nil
	},
	AnnotationPrefix + "initrd": func(c *Config, v string) error {
		c.Sandbox.Machine.Initrd = v
		return nil
	},
	AnnotationPrefix + "kernel_params": func(c *Config, v string) error {
		m := &c.Sandbox.Machine
		m.KernelParams = append(slices.Clone(m.KernelParams), strings.Fields(v)...)
		return nil
	},
	AnnotationPrefix + "vcpus": func(c *Config, v string) error {
		n, err := strconv.Atoi(v)
		c.Sandbox.Machine.VCPUs, c.Sandbox.Machine.MaxVCPUs = n, n
		return err
	},
	AnnotationPrefix + "memory_mib": func(c *Config, v string) error {
		n, err := strconv.Atoi(v)
		c.Sandbox.Machine.MemoryMiB, c.Sandbox.Machine.MaxMemoryMiB = n, n
		return err
	},
	AnnotationPrefix + "virtiofsd_cache": func(c *Config, v string) error {
		c.QEMU.VirtiofsdCache = v
		return nil
	},
}

func annotationNames() []string { return slices.Sorted(maps.Keys(annotations)) }

// Annotate applies the annotations of a spec. One that names a setting but is
// not allowed is an error (errdefs.ErrPermissionDenied), and so is one with
// our prefix that names none (errdefs.ErrInvalidArgument).
func (c Config) Annotate(spec map[string]string) (Config, error) {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(spec)) {
		if !strings.HasPrefix(name, AnnotationPrefix) {
			continue
		}
		set, ok := annotations[name]
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("annotation %q names no setting: %w", name, errdefs.ErrInvalidArgument))
		case !slices.Contains(c.Annotations, name):
			errs = append(errs, fmt.Errorf("annotation %q is not in the configuration's list: %w", name, errdefs.ErrPermissionDenied))
		default:
			c.QEMU.MakeTemplates = qemu.MakeNever // who can write a specification could fill the host's disk
			if err := set(&c, spec[name]); err != nil {
				errs = append(errs, fmt.Errorf("annotation %q: %w: %w", name, err, errdefs.ErrInvalidArgument))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return Config{}, err
	}
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("with the annotations of the container: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}
