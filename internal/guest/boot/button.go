package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/guest/module"
)

// A powerButton is where the kernel announces ACPI events, as its button
// driver makes them.
type powerButton struct{ netlinkSocket }

func listenButton(modules *module.Loader) (powerButton, error) {
	if err := modules.Load("button", ""); err != nil {
		return powerButton{noSocket}, err
	}
	family, err := netlink.GenlFamilyGet("acpi_event")
	if errors.Is(err, unix.ENOENT) {
		return powerButton{noSocket}, nil // a machine without ACPI
	}
	if err != nil {
		return powerButton{noSocket}, fmt.Errorf("find acpi events: %w", err)
	}
	s, err := listenNetlink(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return powerButton{noSocket}, err
	}
	for _, group := range family.Groups {
		if err := unix.SetsockoptInt(int(s), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(group.ID)); err != nil {
			unix.Close(int(s))
			return powerButton{noSocket}, fmt.Errorf("listen to acpi events: %w", err)
		}
	}
	return powerButton{s}, nil
}

// watch asks the agent to end when the button is pressed (system_powerdown of
// QMP).
func (b powerButton) watch(ctx context.Context, agent int) {
	if b.netlinkSocket < 0 {
		return
	}
	err := b.receive(func(msg []byte) {
		if isPowerButton(msg) {
			log.G(ctx).Info("power button pressed")
			_ = unix.Kill(agent, unix.SIGTERM) // ESRCH: it ends already
		}
	})
	log.G(ctx).WithError(err).Warn("power button ignored from now on")
}

// isPowerButton looks for the class of device in an acpi_genl_event
// (drivers/acpi/event.c), which has it in its first field.
func isPowerButton(msg []byte) bool {
	return bytes.Contains(msg, []byte("button/power\x00"))
}
