package main

import (
	"context"
	"strings"

	"github.com/containerd/log"

	"github.com/vmshim/vmshim/internal/guest"
	"github.com/vmshim/vmshim/internal/guest/boot"
	"github.com/vmshim/vmshim/internal/guest/module"
	"github.com/vmshim/vmshim/internal/version"
)

// serve runs the agent until the host or the power button ends it.
func serve(ctx context.Context) error {
	params, err := boot.ReadParams()
	if err != nil {
		log.G(ctx).WithError(err).Warn("kernel parameters ignored")
	}
	modules := module.New(module.Dir)
	return guest.Serve(ctx, guest.Config{
		Version:        version.Version,
		Addr:           params.Agent.ServerAddr,
		InitDaemon:     true,
		PipeSize:       params.Agent.ContainerPipeBytes,
		HotplugTimeout: params.Agent.HotplugTimeout,
		Ready:          params.Ready.Push,
		LoadModule: func(_ context.Context, name string, params []string) error {
			return modules.Load(name, strings.Join(params, " "))
		},
	})
}
