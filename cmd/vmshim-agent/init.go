package main

import (
	"os"
	"runtime"

	_ "github.com/opencontainers/cgroups/devices" // device rules of cgroups
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // joins namespaces before Go runs
)

// A container's first process is this binary again, started by libcontainer.
// It must get there before main does anything else.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init()
	}
	// The main goroutine keeps the main thread for itself: libcontainer enters
	// containers' mount namespaces on threads that it then throws away, and the
	// main thread can't be thrown away. All of /proc/self would be the
	// container's from then on.
	runtime.LockOSThread()
}
