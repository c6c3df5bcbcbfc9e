package shim

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A pidfd is another process, found by pid and start time so that it cannot be
// a later one with the same pid.
type pidfd int

// errGone says that the process is not there any more.
var errGone = errors.New("process is gone")

func openPidfd(pid int, startTime uint64) (pidfd, error) {
	if pid <= 0 {
		return -1, errGone
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, errGone
	}
	// Compared while the descriptor pins the process.
	if t, err := processStart(pid); err != nil || t != startTime {
		_ = unix.Close(fd)
		return -1, errGone
	}
	return pidfd(fd), nil
}

func (p pidfd) kill() { _ = unix.PidfdSendSignal(int(p), unix.SIGKILL, nil, 0) }

func (p pidfd) close() { _ = unix.Close(int(p)) }

// wait says whether the process has ended within the time.
func (p pidfd) wait(d time.Duration) bool {
	deadline := time.Now().Add(d)
	for {
		fds := []unix.PollFd{{Fd: int32(p), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(0, time.Until(deadline).Milliseconds())))
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

// processStart is field 22 of /proc/PID/stat: clock ticks since boot.
func processStart(pid int) (uint64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses, and may hold anything.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("parse /proc/%d/stat", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
