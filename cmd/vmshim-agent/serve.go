package main

import (
	"context"

	"github.com/containerd/log"

	"github.com/vmshim/vmshim/internal/guest/boot"
)

// serve runs the agent until the host or the power button ends it.
func serve(ctx context.Context) error {
	params, err := boot.ReadParams()
	if err != nil {
		log.G(ctx).WithError(err).Warn("kernel parameters ignored")
	}
	if err := params.Ready.Push(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("host not told")
	}
	log.G(ctx).Info("agent runs")
	<-ctx.Done()
	return nil
}
