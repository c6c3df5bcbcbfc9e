package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"github.com/moby/sys/capability"
	_ "github.com/opencontainers/cgroups/devices" // device rules of cgroups
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // joins namespaces before Go runs
	"golang.org/x/sys/unix"
)

// A container's first process is this binary again, started by libcontainer.
// It must get there before main does anything else.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		err := rejoin()
		if err == nil {
			err = checkLastCap()
		}
		if err == nil {
			err = keepTime()
		}
		if err != nil {
			refuse(err)
		}
		libcontainer.Init()
	}
	// The main goroutine keeps the main thread for itself: libcontainer enters
	// containers' mount namespaces on threads that it then throws away, and the
	// main thread can't be thrown away. All of /proc/self would be the
	// container's from then on.
	runtime.LockOSThread()
}

// rejoin enters the namespaces whose descriptors an exec was given (see
// internal/guest): libcontainer has brought it into those of the container's
// first process, which may have moved into others. Init runs on the main thread
// alone, which is the one that executes the command.
func rejoin() error {
	if os.Getenv("_LIBCONTAINER_INITTYPE") != "setns" {
		return nil
	}
	// What libcontainer itself passes on begins behind them.
	behind, err := strconv.Atoi(cmp.Or(os.Getenv("_LIBCONTAINER_CONSOLE"), os.Getenv("_LIBCONTAINER_INITPIPE")))
	if err != nil {
		return fmt.Errorf("descriptors of libcontainer: %w", err)
	}
	const first = 3 // behind the standard streams
	if behind > first {
		// A mount namespace is entered only by who shares its root with nobody.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare root: %w", err)
		}
	}
	for fd := first; fd < behind; fd++ {
		unix.CloseOnExec(fd)
		if err := unix.Setns(fd, 0); err != nil {
			return fmt.Errorf("join namespace: %w", err)
		}
	}
	return nil
}

// checkLastCap refuses a /proc that does not tell the truth about the kernel's
// last capability. An exec begins in the container's mount namespace, where the
// workload may have put a file of its own over cap_last_cap; by that file
// libcontainer would drop too few capabilities from the bounding set. It asks
// once in the life of a process, which is here.
func checkLastCap() error {
	said, err := capability.LastCap()
	if err != nil {
		return nil //nolint:nilerr // libcontainer fails by it, too
	}
	for n := said; n <= said+1; n++ {
		_, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(n), 0, 0, 0)
		if known := !errors.Is(err, unix.EINVAL); known != (n == said) {
			return fmt.Errorf("last capability is not %d, whatever /proc says", said)
		}
	}
	return nil
}

// refuse ends a container's first steps. Who started them reads their log.
func refuse(err error) {
	if fd, ferr := strconv.Atoi(os.Getenv("_LIBCONTAINER_LOGPIPE")); ferr == nil {
		fmt.Fprintf(os.NewFile(uintptr(fd), "log"), "{\"level\":\"error\",\"msg\":%q}\n", err.Error())
	}
	os.Exit(1)
}
