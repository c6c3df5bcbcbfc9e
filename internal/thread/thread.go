// Package thread runs code that changes what belongs to a thread: namespaces,
// root, working directory, the slack of timers.
package thread

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// CalmMonitor is a slack for the monitor of Go's runtime (runtime.sysmon), which
// wants to wake every 20 µs after each rest of the program: where QEMU emulates, a
// switch to it and back takes 300 µs. With 2 ms a quarter of the switches that an
// emulated guest has with a stream of input went to it; an exec takes no longer
// with 8.
const CalmMonitor = 8 * time.Millisecond

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

// WithTimerSlack calls f on a thread whose timers may be late by slack, as may be
// those of the processes that it starts meanwhile (PR_SET_TIMERSLACK in prctl(2)).
func WithTimerSlack(slack time.Duration, f func() error) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	was, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("get timer slack: %w", err)
	}
	if err := SetTimerSlack(slack); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, SetTimerSlack(time.Duration(was))) }()
	return f()
}

// SetTimerSlack is for the calling thread.
func SetTimerSlack(slack time.Duration) error {
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(slack), 0, 0, 0); err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	return nil
}
