package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// lockName is that of an abstract socket in every namespace that a machine has
// the frames of. It goes with the process that bound it.
const lockName = "@vmshim/network"

// A TakenError says that another process has the namespace.
type TakenError struct{ PID int }

func (e *TakenError) Error() string {
	return fmt.Sprintf("network namespace is in use by the machine of process %d", e.PID)
}

// Is makes it one of the class ErrAlreadyExists.
func (e *TakenError) Is(target error) bool { return target == errdefs.ErrAlreadyExists }

// Lock takes the namespace for one machine, until the file is closed; a
// *TakenError says who has it. Two machines can't share an address.
func (n *Namespace) Lock() (lock *os.File, err error) {
	err = n.inside(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		f := os.NewFile(uintptr(fd), lockName)
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: lockName})
		switch {
		case errors.Is(err, unix.EADDRINUSE):
			return errors.Join(taken(fd), f.Close())
		case err == nil:
			err = unix.Listen(fd, 1) // so that others can ask who it is
		}
		if err != nil {
			return errors.Join(err, f.Close())
		}
		lock = f
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("lock network namespace: %w", err)
	}
	return lock, nil
}

// taken asks who listens.
func taken(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: lockName}); err != nil {
		return &TakenError{}
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return &TakenError{}
	}
	return &TakenError{PID: int(cred.Pid)}
}
