// Package thread runs code that changes what belongs to a thread: namespaces,
// root, working directory.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run calls f on a thread of its own that ends afterwards, whatever f did to it.
// That is never the process' first one: it cannot end, and is what /proc/PID
// shows.
func Run(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			done <- Run(f) // on another one, as this is taken
			return
		}
		done <- f()
	}()
	return <-done
}
