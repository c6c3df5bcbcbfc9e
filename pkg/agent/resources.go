package agent

import (
	"context"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// OnlineCPUMem implements Resources. The answer comes when the CPUs are online.
func (c *Client) OnlineCPUMem(ctx context.Context, cpus uint32, cpuOnly bool) error {
	return tell(ctx, c.peer.Load(), service.OnlineCPUMem, &protocol.OnlineCPUMemRequest{
		Wait:    true,
		NbCpus:  cpus,
		CpuOnly: cpuOnly,
	})
}

// MemHotplugByProbe implements Resources.
func (c *Client) MemHotplugByProbe(ctx context.Context, addrs []uint64) error {
	return tell(ctx, c.peer.Load(), service.MemHotplugByProbe, &protocol.MemHotplugByProbeRequest{MemHotplugProbeAddr: addrs})
}

// AddSwap implements Resources.
func (c *Client) AddSwap(ctx context.Context, pciPath []uint32) error {
	return tell(ctx, c.peer.Load(), service.AddSwap, &protocol.AddSwapRequest{PCIPath: pciPath})
}

// AddSwapPath implements Resources.
func (c *Client) AddSwapPath(ctx context.Context, path string) error {
	return tell(ctx, c.peer.Load(), service.AddSwapPath, &protocol.AddSwapPathRequest{Path: path})
}
