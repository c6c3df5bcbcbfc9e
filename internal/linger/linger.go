// Package linger waits for a file as a thread in the kernel: for a moment, where
// more is expected at once. Where all goroutines wait and one goes on, Go's
// scheduler passes threads around, which costs more than a piece of a stream.
package linger

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// moment bounds one wait.
const moment = 10 * time.Millisecond

// Do calls f, which must not block, until it is done or fails. Where f can't go on
// (EAGAIN) it waits for the events of poll(2), at most so many times. It is not done
// when they did not come. Nobody can end such a wait: not by a deadline, nor by
// closing the file.
func Do(fd int, events int16, times int, f func(fd int) (done bool, err error)) (done bool, err error) {
	for {
		done, err = f(fd)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if times--; times < 0 || !ready(fd, events) {
				return false, nil
			}
		case done || err != nil:
			return done, err
		}
	}
}

func ready(fd int, events int16) bool {
	n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, int(moment/time.Millisecond))
	return n > 0
}
