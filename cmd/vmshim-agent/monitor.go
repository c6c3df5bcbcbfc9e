package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/vmshim/vmshim/internal/thread"
)

// kernelSlack is what the kernel gives a thread (INIT_TASK, timer_slack_ns).
const kernelSlack = 50 * time.Microsecond

// calmMonitor lets the runtime's monitor sleep for longer than it wants: it took
// more time of a stream than the stream. It is the first thread that the runtime
// starts.
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
	slack := strconv.FormatInt(int64(thread.CalmMonitor), 10)
	return os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", first), []byte(slack), 0)
}

// keepTime gives a container's process the kernel's own slack again, instead of
// that of its first steps (launch in internal/guest).
func keepTime() error {
	return thread.SetTimerSlack(kernelSlack)
}
