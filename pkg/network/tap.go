package network

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const tunPath = "/dev/net/tun"

// openTap makes a tap in the namespace, with as many queues. It has no life of
// its own: it goes with the last of its descriptors.
func (n *Namespace) openTap(name string, queues int) (files []*os.File, err error) {
	err = n.inside(func() error {
		for i := range queues {
			f, err := openQueue(tunPath, name, i == 0, queues > 1)
			if err != nil {
				return fmt.Errorf("queue %d: %w", i, err)
			}
			files = append(files, f)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open tap %q: %w", name, err), closeAll(files))
	}
	return files, nil
}

func openQueue(path, name string, first, several bool) (*os.File, error) {
	// IFF_VNET_HDR: checksums and segmentation are left to who can do them.
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if first {
		flags |= unix.IFF_TUN_EXCL // never a queue of somebody else's tap
	}
	if several {
		flags |= unix.IFF_MULTI_QUEUE
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(flags)
		err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), path), nil // not before: there was nothing to poll
}

const vhostPath = "/dev/vhost-net"

// openVhost opens the kernel's mover of packets, once for each queue; nil where
// there is none and nobody insists.
func openVhost(choice string, queues int) (files []*os.File, err error) {
	if choice == "off" {
		return nil, nil
	}
	for range queues {
		f, err := os.OpenFile(vhostPath, os.O_RDWR, 0)
		switch {
		case err == nil:
			files = append(files, f)
		case choice == "on" || len(files) > 0:
			return nil, errors.Join(err, closeAll(files))
		default:
			return nil, nil
		}
	}
	return files, nil
}

func closeAll(files []*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
