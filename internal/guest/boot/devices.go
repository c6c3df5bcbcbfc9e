package boot

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/guest/module"
)

// watchDevices loads the drivers of the virtio devices that are there, and
// then of every device the kernel announces.
func watchDevices(ctx context.Context, modules *module.Loader) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1})
	}
	if err != nil {
		log.G(ctx).WithError(err).Error("drivers of hot-plugged devices are not loaded")
		return
	}
	defer unix.Close(fd)
	// First listen, then look, so that nothing is missed in between.
	loadPresent(ctx, modules)
	buf := make([]byte, 16<<10) // the kernel's are at most 2 KiB
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOBUFS): // lost some
		case err != nil:
			log.G(ctx).WithError(err).Error("drivers of hot-plugged devices are no longer loaded")
			return
		default:
			if alias, ok := addedAlias(buf[:n]); ok {
				loadDriver(ctx, modules, alias)
			}
		}
	}
}

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
