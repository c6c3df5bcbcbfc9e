package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/guest/module"
)

// A netlinkSocket is what the kernel announces things on. Negative means none.
type netlinkSocket int

const noSocket netlinkSocket = -1

func listenNetlink(protocol int, groups uint32) (netlinkSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return noSocket, fmt.Errorf("netlink: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return noSocket, fmt.Errorf("netlink: bind: %w", err)
	}
	return netlinkSocket(fd), nil
}

// receive calls do for every message until the socket fails.
func (s netlinkSocket) receive(do func(msg []byte)) error {
	buf := make([]byte, 16<<10) // the kernel's are at most 2 KiB
	for {
		n, err := unix.Read(int(s), buf)
		switch {
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOBUFS): // lost some
		case err != nil:
			return err
		default:
			do(buf[:n])
		}
	}
}

// uevents is where the kernel announces devices.
type uevents struct{ netlinkSocket }

// listenDevices comes before a look at the devices that are there, so that
// nothing is missed in between.
func listenDevices() (uevents, error) {
	s, err := listenNetlink(unix.NETLINK_KOBJECT_UEVENT, 1)
	return uevents{s}, err
}

// watch loads the drivers of devices as they come.
func (u uevents) watch(ctx context.Context, modules *module.Loader) {
	if u.netlinkSocket < 0 {
		return
	}
	err := u.receive(func(msg []byte) {
		if alias, ok := addedAlias(msg); ok {
			loadDriver(ctx, modules, alias)
		}
	})
	log.G(ctx).WithError(err).Error("drivers of hot-plugged devices are no longer loaded")
}

// loadPresent loads the drivers of the virtio devices that are there.
func loadPresent(ctx context.Context, modules *module.Loader) {
	files, _ := filepath.Glob("/sys/bus/virtio/devices/*/modalias") // the pattern is right
	for _, f := range files {
		if alias, err := os.ReadFile(f); err == nil {
			loadDriver(ctx, modules, strings.TrimSpace(string(alias)))
		}
	}
}

func loadDriver(ctx context.Context, modules *module.Loader, alias string) {
	err := modules.Load(alias, "")
	if err != nil && !errdefs.IsNotFound(err) { // built in, or nothing we use
		log.G(ctx).WithError(err).Warnf("load driver of %q", alias)
	}
}

// addedAlias gets the module alias out of a uevent: fields that end in a zero
// byte, after a first one that is for people.
func addedAlias(event []byte) (alias string, ok bool) {
	added := false
	for field := range bytes.SplitSeq(event, []byte{0}) {
		key, value, _ := bytes.Cut(field, []byte("="))
		switch string(key) {
		case "ACTION":
			added = string(value) == "add"
		case "MODALIAS":
			alias = string(value)
		}
	}
	return alias, added && alias != ""
}
