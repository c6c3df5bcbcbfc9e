package config

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/network"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// file is the configuration as it is written.
type file struct {
	StateDir      string       `toml:"state_dir"`
	Debug         bool         `toml:"debug"`
	TemplateDir   string       `toml:"template_dir"`
	MakeTemplates string       `toml:"make_templates"`
	Annotations   []string     `toml:"annotations"`
	Machine       fileMachine  `toml:"machine"`
	QEMU          fileQEMU     `toml:"qemu"`
	Network       fileNetwork  `toml:"network"`
	Timeouts      fileTimeouts `toml:"timeouts"`
}

type fileMachine struct {
	Kernel       string   `toml:"kernel"`
	Initrd       string   `toml:"initrd"`
	KernelParams []string `toml:"kernel_params"`
	VCPUs        int      `toml:"vcpus"`
	MemoryMiB    int      `toml:"memory_mib"`
}

type fileQEMU struct {
	Path             string `toml:"path"`
	Accelerator      string `toml:"accelerator"`
	Vsock            string `toml:"vsock"`
	Machine          string `toml:"machine"`
	CPU              string `toml:"cpu"`
	VhostDeviceVsock string `toml:"vhost_device_vsock"`
	Virtiofsd        string `toml:"virtiofsd"`
	VirtiofsdCache   string `toml:"virtiofsd_cache"`
	UIDBase          uint32 `toml:"uid_base"`
}

type fileNetwork struct {
	Model    string `toml:"model"`
	VhostNet string `toml:"vhost_net"`
}

type fileTimeouts struct {
	Start   duration `toml:"start"`
	Stop    duration `toml:"stop"`
	Request duration `toml:"request"`
	Hook    duration `toml:"hook"`
}

func defaults() file {
	return file{
		StateDir:      "/run/vmshim",
		TemplateDir:   "/var/lib/vmshim/templates",
		MakeTemplates: qemu.MakeEmulated,
		Machine:       fileMachine{VCPUs: 1, MemoryMiB: 256},
		QEMU: fileQEMU{
			Accelerator:    "auto",
			Vsock:          "auto",
			VirtiofsdCache: "auto",
			// Above what distributions, useradd and systemd-nspawn hand out.
			UIDBase: 2_000_000_000,
		},
		Network: fileNetwork{Model: string(network.TC), VhostNet: "auto"},
		Timeouts: fileTimeouts{
			Start:   duration(60 * time.Second),
			Stop:    duration(10 * time.Second),
			Request: duration(60 * time.Second),
			Hook:    duration(30 * time.Second),
		},
	}
}

func (f file) config() Config {
	return Config{
		StateDir:    f.StateDir,
		Debug:       f.Debug,
		Annotations: f.Annotations,
		QEMU: qemu.Config{
			Path:             f.QEMU.Path,
			Accelerator:      f.QEMU.Accelerator,
			Vsock:            f.QEMU.Vsock,
			Machine:          f.QEMU.Machine,
			CPU:              f.QEMU.CPU,
			VhostDeviceVsock: f.QEMU.VhostDeviceVsock,
			Virtiofsd:        f.QEMU.Virtiofsd,
			VirtiofsdCache:   f.QEMU.VirtiofsdCache,
			UIDBase:          f.QEMU.UIDBase,
			CacheDir:         f.StateDir,
			TemplateDir:      f.TemplateDir,
			MakeTemplates:    f.MakeTemplates,
		},
		Sandbox: sandbox.Config{
			Machine: hypervisor.Spec{
				Arch:         arch(),
				Kernel:       f.Machine.Kernel,
				Initrd:       f.Machine.Initrd,
				KernelParams: f.Machine.KernelParams,
				VCPUs:        f.Machine.VCPUs,
				MaxVCPUs:     f.Machine.VCPUs,
				MemoryMiB:    f.Machine.MemoryMiB,
				MaxMemoryMiB: f.Machine.MemoryMiB,
			},
			StartTimeout:   time.Duration(f.Timeouts.Start),
			StopTimeout:    time.Duration(f.Timeouts.Stop),
			RequestTimeout: time.Duration(f.Timeouts.Request),
			HookTimeout:    time.Duration(f.Timeouts.Hook),
			Network:        network.Config{Model: network.Model(f.Network.Model), Vhost: f.Network.VhostNet},
		},
	}
}

// decode reads text over the defaults. Keys of the graveyard become warnings.
func decode(name string, text []byte, graveyard map[string]string) (file, []string, error) {
	f := defaults()
	dec := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	err := dec.Decode(&f)
	var unknown *toml.StrictMissingError
	var fault *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		warnings, err := missing(name, unknown, graveyard)
		return f, warnings, err
	case errors.As(err, &fault):
		row, _ := fault.Position()
		return f, nil, fmt.Errorf("%s:%d: %w", name, row, fault)
	case err != nil:
		return f, nil, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil, nil
}

func missing(name string, unknown *toml.StrictMissingError, graveyard map[string]string) (warnings []string, _ error) {
	var errs []error
	for _, e := range unknown.Errors {
		row, _ := e.Position()
		key := strings.Join(e.Key(), ".")
		if instead, ok := graveyard[key]; ok {
			warnings = append(warnings, fmt.Sprintf("%s:%d: %s has no effect any more: %s", name, row, key, instead))
			continue
		}
		errs = append(errs, fmt.Errorf("%s:%d: unknown key %q", name, row, key))
	}
	return warnings, errors.Join(errs...)
}

// duration is written as Go writes it: "1m30s".
type duration time.Duration

func (d *duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = duration(v)
	return err
}
