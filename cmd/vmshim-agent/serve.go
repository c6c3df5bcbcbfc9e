package main

import (
	"cmp"
	"context"
	"os"
	"runtime"
	"strings"

	"github.com/containerd/log"

	"github.com/vmshim/vmshim/internal/guest"
	"github.com/vmshim/vmshim/internal/guest/boot"
	"github.com/vmshim/vmshim/internal/guest/module"
	"github.com/vmshim/vmshim/internal/version"
)

// serve runs the agent until the host or the power button ends it.
func serve(ctx context.Context) error {
	// With one P the runtime takes it from every system call of more than 20 µs
	// (runtime.retake), of which an emulated machine has many: two threads then
	// pass it to each other, and the watching one never sleeps.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	if err := calmMonitor(); err != nil {
		log.G(ctx).WithError(err).Warn("streams are slower: the runtime's monitor has the kernel's timer slack")
	}
	params, err := boot.ReadParams()
	if err != nil {
		log.G(ctx).WithError(err).Warn("kernel parameters skipped")
	}
	boot.SetLevel(log.G(ctx).Logger, cmp.Or(os.Getenv("KATA_AGENT_LOG_LEVEL"), params.Agent.LogLevel))
	if names := params.Agent.Ignored; len(names) > 0 {
		log.G(ctx).Warnf("kernel parameters have no meaning here: %s", strings.Join(names, ", "))
	}
	addr := cmp.Or(os.Getenv("KATA_AGENT_SERVER_ADDR"), params.Agent.ServerAddr)
	if err := guest.CheckAddr(addr); err != nil {
		log.G(ctx).WithError(err).Warn("kernel parameter agent.server_addr ignored")
		addr = ""
	}
	modules := module.New(module.Dir)
	var ready func(context.Context) error
	if params.Ready {
		ready = boot.PushReady
	}
	return guest.Serve(ctx, guest.Config{
		Version:        version.Version,
		Addr:           addr,
		InitDaemon:     true,
		PipeSize:       params.Agent.ContainerPipeBytes,
		HotplugTimeout: params.Agent.HotplugTimeout,
		Ready:          ready,
		LoadModule: func(_ context.Context, name string, params []string) error {
			return modules.Load(name, strings.Join(params, " "))
		},
	})
}
