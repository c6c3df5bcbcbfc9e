package boot

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
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
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i].Mountpoint, 0); err != nil {
			log.G(ctx).WithError(err).Errorf("unmount %q", mounts[i].Mountpoint)
			_ = unix.Mount("", mounts[i].Mountpoint, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // the next best
		}
	}
}

// watchPowerButton asks the agent to end when the button is pressed (QMP
// system_powerdown). The driver tells by a netlink family of its own.
func watchPowerButton(ctx context.Context, agent int) {
	family, err := netlink.GenlFamilyGet("acpi_event")
	if err != nil || len(family.Groups) == 0 {
		return // no ACPI
	}
	s, err := nl.Subscribe(unix.NETLINK_GENERIC)
	if err != nil {
		log.G(ctx).WithError(err).Warn("power button ignored")
		return
	}
	defer s.Close()
	if err := unix.SetsockoptInt(s.GetFd(), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(family.Groups[0].ID)); err != nil {
		log.G(ctx).WithError(err).Warn("power button ignored")
		return
	}
	for {
		msgs, _, err := s.Receive()
		if err != nil {
			log.G(ctx).WithError(err).Warn("power button ignored from now on")
			return
		}
		for _, m := range msgs {
			if isPowerButton(m.Data) {
				log.G(ctx).Info("power button pressed")
				_ = unix.Kill(agent, unix.SIGTERM) // ESRCH: it ends already
			}
		}
	}
}

// isPowerButton looks for the class of device in an acpi_genl_event
// (drivers/acpi/event.c), which begins with a string of 20 bytes.
func isPowerButton(data []byte) bool {
	return strings.Contains(string(data), "button/power")
}
