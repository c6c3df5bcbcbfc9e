package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// uevents tell that something about the guest's devices has changed. What it was
// is not kept: who waits for a device looks at sysfs again. So nothing is missed
// when the kernel had to drop events, and nothing piles up when they come faster
// than somebody looks. One socket and one goroutine, run, serve all.
type uevents struct {
	file *os.File // the netlink socket, non-blocking

	mu      sync.Mutex
	waiters map[chan struct{}]struct{} // each holds one mark; guarded by mu
}

func newUevents() (*uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen to device events: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen to device events: %w", err)
	}
	return &uevents{file: os.NewFile(uintptr(fd), "uevents"), waiters: map[chan struct{}]struct{}{}}, nil
}

// run returns after close.
func (u *uevents) run() error {
	buf := make([]byte, 64) // the rest of a message is cut off
	for {
		_, err := u.file.Read(buf)
		switch {
		case err == nil, errors.Is(err, io.EOF): // an empty message is one
		case errors.Is(err, unix.ENOBUFS): // events were lost
		case errors.Is(err, os.ErrClosed):
			return nil
		default:
			return fmt.Errorf("read device events: %w", err)
		}
		u.wake()
	}
}

func (u *uevents) close() error { return u.file.Close() }

func (u *uevents) wake() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for w := range u.waiters {
		select {
		case w <- struct{}{}:
		default: // it will look again anyway
		}
	}
}

// await calls done, at first at once and then after each event, until it says so
// or fails, or ctx ends.
func (u *uevents) await(ctx context.Context, done func() (bool, error)) error {
	changed := make(chan struct{}, 1)
	u.mu.Lock()
	u.waiters[changed] = struct{}{}
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.waiters, changed)
	}()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
