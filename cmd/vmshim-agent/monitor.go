package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// monitorSlack is how much later than it wants the runtime's monitor may wake.
	// With 2 ms a quarter of the switches that an emulated guest has with a stream
	// of input went to it; an exec takes no longer with 8.
	monitorSlack = 8 * time.Millisecond
	// kernelSlack is what the kernel gives a thread (INIT_TASK, timer_slack_ns).
	kernelSlack = 50 * time.Microsecond
)

// calmMonitor lets the runtime's monitor (runtime.sysmon) sleep for longer than
// the 20 µs that it wants after every rest of the program: where QEMU emulates,
// a switch to it and back costs 300 µs, and it took more time of a stream than
// the stream. It is the first thread that the runtime starts.
func calmMonitor() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	first, self := 0, os.Getpid()
	for _, t := range threads {
		if id, err := strconv.Atoi(t.Name()); err == nil && id != self && (first == 0 || id < first) {
			first = id
		}
	}
	slack := strconv.FormatInt(int64(monitorSlack), 10)
	return os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", first), []byte(slack), 0)
}

// keepTime gives a container's process the kernel's own slack again, instead of
// that of its first steps (initSlack in internal/guest).
func keepTime() error {
	return unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(kernelSlack), 0, 0, 0)
}
