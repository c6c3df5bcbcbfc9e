// Command containerd-shim-vm-v2 is the runtime io.containerd.vm.v2: containerd
// starts it for each pod, or container, that gets a virtual machine of its own.
package main

import (
	"context"
	"errors"
	"os"

	"github.com/containerd/log"

	"github.com/vmshim/vmshim/internal/version"
	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/sandbox"
	"github.com/vmshim/vmshim/pkg/shim"
)

var _ sandbox.Machine = (*qemu.VM)(nil)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "anchor" {
		os.Exit(sandbox.AnchorMain(os.Args[2:]))
	}
	os.Exit(shim.Main(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr, shim.Options{
		Version: version.Version,
		Sandbox: options,
	}))
}

// options are what the shim cannot know of a sandbox.
func options(cfg config.Config) sandbox.Options {
	cfg.QEMU.CacheDir = cfg.StateDir // what QEMU says of itself, for the next start
	o := sandbox.Options{
		Config: cfg.Sandbox,
		StartVM: func(ctx context.Context, spec hypervisor.Spec, opts sandbox.VMOptions) (sandbox.Machine, error) {
			return startVM(ctx, cfg.QEMU, spec, opts)
		},
	}
	if cfg.QEMU.TemplateDir != "" && cfg.QEMU.MakeTemplates != qemu.MakeNever {
		o.MakeTemplate = func(ctx context.Context, spec hypervisor.Spec, opts sandbox.VMOptions) (bool, error) {
			how, err := machineOptions(ctx, cfg.QEMU, opts)
			if err != nil {
				return false, err
			}
			return qemu.EnsureTemplate(ctx, spec, how)
		}
	}
	return o
}

func machineOptions(ctx context.Context, cfg qemu.Config, opts sandbox.VMOptions) (qemu.Options, error) {
	host, err := qemu.Probe(ctx, cfg)
	return qemu.Options{
		Config:   cfg,
		Host:     host,
		Dir:      opts.Dir,
		Env:      opts.Env,
		Started:  opts.Started,
		CgroupFD: opts.CgroupFD,
	}, err
}

func startVM(ctx context.Context, cfg qemu.Config, spec hypervisor.Spec, opts sandbox.VMOptions) (sandbox.Machine, error) {
	how, err := machineOptions(ctx, cfg, opts)
	if err != nil {
		return nil, err
	}
	for _, w := range how.Host.Warnings {
		log.G(ctx).Warn(w)
	}
	vm, err := qemu.Start(ctx, spec, how)
	var unusable *qemu.TemplateError
	if errors.As(err, &unusable) && ctx.Err() == nil {
		log.G(ctx).WithError(err).Warn("the machine boots")
		how.Config.TemplateDir = ""
		vm, err = qemu.Start(ctx, spec, how)
	}
	if err != nil {
		return nil, err // not vm: a nil *qemu.VM is not a nil Machine
	}
	return vm, nil
}
