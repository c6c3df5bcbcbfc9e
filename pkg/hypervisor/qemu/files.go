package qemu

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// openReadable opens a file that QEMU is to open again by its number, which
// takes the right to read it, as uid, but no right to the directories above.
func openReadable(what, path string, private bool) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, classed(err))
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	case info.Size() == 0:
		err = fmt.Errorf("%s is empty: %w", path, errdefs.ErrInvalidArgument)
	case private && info.Mode()&0o004 == 0:
		err = fmt.Errorf("%s is not readable for all (chmod a+r), which QEMU's user needs: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return f, nil
}

// classed gives a missing file the class that an RPC can carry.
func classed(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// openDisk opens an image or a block device for QEMU, which takes it as it is.
func openDisk(disk hypervisor.Disk) (f *os.File, block bool, err error) {
	flags := os.O_RDWR
	if disk.ReadOnly {
		flags = os.O_RDONLY
	}
	f, err = os.OpenFile(disk.Path, flags|unix.O_NONBLOCK, 0) // or a named pipe would wait for a writer
	if err != nil {
		return nil, false, classed(err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, false, err
	}
	block = info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0
	if !block && !info.Mode().IsRegular() {
		f.Close()
		return nil, false, fmt.Errorf("%s is neither a file nor a block device: %w", disk.Path, errdefs.ErrInvalidArgument)
	}
	return f, block, nil
}

// randomCID is a context id that a guest can have (linux/vm_sockets.h), and
// whose number is no port that a program of the host chose for itself.
func randomCID() uint32 { return 1<<16 + rand.Uint32N(1<<31) }

// vhostVsockSetGuestCID is _IOW(VHOST_VIRTIO, 0x60, __u64), see linux/vhost.h.
// It is the same on amd64 and arm64.
const vhostVsockSetGuestCID = 0x4008af60

func setGuestCID(device *os.File, cid uint32) error {
	raw, err := device.SyscallConn()
	if err != nil {
		return err
	}
	arg := uint64(cid)
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, vhostVsockSetGuestCID, uintptr(unsafe.Pointer(&arg)))
	}); err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	return nil
}
