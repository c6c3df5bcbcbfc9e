package boot

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const (
	// stopTimeout bounds the orderly part of powering off: a process in a dead
	// share can't be killed, and sync waits for dead disks.
	stopTimeout  = 5 * time.Second
	flushTimeout = time.Second
)

// powerOff ends the machine. The kernel parameter panic=-1 and QEMU's
// -no-reboot do the same should this process die before it gets here.
func powerOff(ctx context.Context, out *console) {
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		killAll()
		unmountAll(ctx)
		unix.Sync()
	}()
	select {
	case <-stopped:
	case <-time.After(stopTimeout):
		log.G(ctx).Error("power off without waiting for processes and disks")
	}
	out.Flush(flushTimeout)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // returns only on failure
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)   // a machine without ACPI
}

// killAll kills every process but this one and waits until they are gone.
func killAll() {
	_ = unix.Kill(-1, unix.SIGKILL) // ESRCH: there was none
	for {
		_, err := unix.Wait4(-1, nil, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// unmountAll unmounts disks, the last mounted first. Everything else goes with
// the machine.
func unmountAll(ctx context.Context) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Source, "/dev/"), false
	})
	if err != nil {
		log.G(ctx).WithError(err).Error("list mounts")
		return
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, 0); err != nil {
			log.G(ctx).WithError(err).Errorf("unmount %q", m.Mountpoint)
			_ = unix.Mount("", m.Mountpoint, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // the next best
		}
	}
}
