package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// What the host plugs into a running machine.

// OnlineCPUMem implements the protocol. It always answers when it is done,
// whether or not the host wants to wait, because an error could not be told
// otherwise.
func (s *service) OnlineCPUMem(ctx context.Context, req *protocol.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	if n := req.GetNbCpus(); n > maxCPU {
		return nil, invalid("%d CPUs", n)
	}
	b := s.sandbox
	if err := b.hotplug.acquire(ctx); err != nil {
		return nil, err
	}
	defer b.hotplug.release()
	if n := int(req.GetNbCpus()); n > 0 {
		if err := b.devices.onlineCPUs(ctx, n); err != nil {
			return nil, err
		}
	}
	if !req.GetCpuOnly() {
		// Nobody says how much memory comes. With CPUs it has come before them.
		wait := req.GetWait() && req.GetNbCpus() == 0
		if err := b.onlineMemory(ctx, wait); err != nil {
			return nil, err
		}
	}
	b.widen(ctx)
	return &emptypb.Empty{}, nil
}

// onlineCPUs brings n more CPUs online.
func (d *devices) onlineCPUs(ctx context.Context, n int) error {
	done := 0
	err := d.until(ctx, "CPUs", func() (bool, error) {
		files, _ := filepath.Glob(filepath.Join(d.sys, "devices/system/cpu/cpu[0-9]*/online")) // the pattern is right
		for _, file := range files {
			if done == n {
				break
			}
			if state, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(state)) != "0" {
				continue // online, or gone
			}
			if err := setFile(file, "1"); err != nil {
				return false, err
			}
			done++
		}
		return done == n, nil
	})
	if err != nil {
		return fmt.Errorf("%d of %d CPUs online: %w", done, n, err)
	}
	return nil
}

// onlineMemory brings all memory online. With wait it waits for some to come, if
// none has since the last time. The caller holds hotplug.
func (b *sandbox) onlineMemory(ctx context.Context, wait bool) error {
	d := b.devices
	if _, err := os.Stat(d.memory()); err != nil {
		return nil //nolint:nilerr // a kernel without hotplug of memory
	}
	come := false
	online := func() (bool, error) {
		blocks, changed, err := d.onlineBlocks()
		come = come || changed || blocks != b.memoryBlocks
		b.memoryBlocks = blocks
		return come, err
	}
	if !wait {
		_, err := online()
		return err
	}
	err := d.until(ctx, "memory", online)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil // there was none to wait for
	}
	return err
}

// onlineBlocks brings all blocks of memory online, and says how many there are
// and whether one was not online.
func (d *devices) onlineBlocks() (count int, changed bool, err error) {
	for {
		files, _ := filepath.Glob(filepath.Join(d.memory(), "memory[0-9]*/state")) // the pattern is right
		again := false
		for _, file := range files {
			if state, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(state)) != "offline" {
				continue
			}
			// Movable, or it could hardly be unplugged again. Not all memory can be that.
			err := setFile(file, "online_movable")
			if errors.Is(err, unix.EINVAL) {
				err = setFile(file, "online")
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return 0, false, err
			}
			again = true
		}
		if !again {
			return len(files), changed, nil
		}
		changed = true // and the rest of its device may have come meanwhile
	}
}

func (d *devices) memory() string { return filepath.Join(d.sys, "devices/system/memory") }

// widen lets containers that were meant for more CPUs, or memory nodes, than the
// guest had use those that it has now.
func (b *sandbox) widen(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, b.devices.timeout)
	defer cancel()
	var jobs sync.WaitGroup
	for _, c := range b.all() {
		jobs.Go(func() {
			err := c.do(ctx, c.widen, nil)
			if err != nil && !errdefs.IsNotFound(err) {
				log.G(ctx).WithError(err).WithField("container_id", c.id).Warn("container keeps its old CPUs")
			}
		})
	}
	jobs.Wait()
}

// widen holds the op lock.
func (c *container) widen() error {
	if st := c.current(); st == stopped {
		return nil
	}
	config := c.lib.Config()
	cpus, mems := c.wanted.clamp()
	if cpus == config.Cgroups.CpusetCpus && mems == config.Cgroups.CpusetMems {
		return nil
	}
	limits := *config.Cgroups
	r := *limits.Resources
	r.CpusetCpus, r.CpusetMems = cpus, mems
	limits.Resources = &r
	config.Cgroups = &limits
	return c.lib.Set(config)
}

// MemHotplugByProbe implements the protocol.
func (s *service) MemHotplugByProbe(_ context.Context, req *protocol.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	probe := filepath.Join(s.sandbox.devices.memory(), "probe")
	for _, address := range req.GetMemHotplugProbeAddr() {
		err := setFile(probe, fmt.Sprintf("%#x", address))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, precondition("the guest's kernel does not probe for memory")
		case errors.Is(err, unix.EEXIST): // the call is repeated
		case errors.Is(err, unix.EINVAL):
			return nil, invalid("no block of memory begins at %#x", address)
		case err != nil:
			return nil, fmt.Errorf("probe memory at %#x: %w", address, err)
		}
	}
	return &emptypb.Empty{}, nil
}

// AddSwap implements the protocol. The host has formatted the disk.
func (s *service) AddSwap(ctx context.Context, req *protocol.AddSwapRequest) (*emptypb.Empty, error) {
	path, err := slotsPath(req.GetPCIPath())
	if err != nil {
		return nil, err
	}
	n, err := s.sandbox.devices.pciDisk(ctx, path)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, swapOn(n.path)
}

// AddSwapPath implements the protocol.
func (s *service) AddSwapPath(ctx context.Context, req *protocol.AddSwapPathRequest) (*emptypb.Empty, error) {
	n, err := s.sandbox.devices.disk(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, swapOn(n.path)
}

func swapOn(path string) error {
	p, err := unix.BytePtrFromString(path)
	if err != nil {
		return invalid("path %q", path)
	}
	_, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(p)), 0, 0)
	switch {
	case errno == 0:
		return nil
	case errors.Is(errno, unix.EINVAL):
		return invalid("%s has no swap area", path)
	case errors.Is(errno, unix.EBUSY):
		return fmt.Errorf("swap on %s: %w", path, errdefs.ErrAlreadyExists)
	}
	return &os.PathError{Op: "swapon", Path: path, Err: errno}
}
