package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
)

// An ID tells namespaces apart, for as long as they are there.
type ID struct {
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode"`
}

// Identify says which namespace a path leads to.
func Identify(path string) (ID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return ID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return ID{st.Dev, st.Ino}, nil
}

// IsHost says whether a path leads to the host's own network namespace: that of
// the first process, or of the caller.
func IsHost(path string) (bool, error) {
	id, err := Identify(path)
	if err != nil {
		return false, err
	}
	for _, host := range []string{"/proc/1/ns/net", "/proc/self/ns/net"} {
		if h, err := Identify(host); err == nil && h == id {
			return true, nil
		}
	}
	return false, nil
}

// A Namespace is a network namespace that is kept open. Its methods are for one
// goroutine at a time.
type Namespace struct {
	file   *os.File
	id     ID
	handle *netlink.Handle
}

// Open opens the namespace at a path.
func Open(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	n := &Namespace{file: f}
	err = n.control(func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("stat: %w", err)
		}
		n.id = ID{st.Dev, st.Ino}
		var err error
		if n.handle, err = netlink.NewHandleAt(netns.NsHandle(fd), unix.NETLINK_ROUTE); err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open network namespace %q: %w", path, err), f.Close())
	}
	return n, nil
}

// ID names it.
func (n *Namespace) ID() ID { return n.id }

// Close lets go of the namespace.
func (n *Namespace) Close() error {
	n.handle.Close()
	return n.file.Close()
}

// control calls f with the descriptor, which stays open meanwhile.
func (n *Namespace) control(f func(fd int) error) error {
	conn, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := conn.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// inside calls f on a thread in the namespace.
func (n *Namespace) inside(f func() error) error {
	return thread.Run(func() error {
		return n.control(func(fd int) error {
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter network namespace: %w", err)
			}
			return f()
		})
	})
}
