package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// trustSeconds is for how long the guest trusts what it knows of a file, by
// default: long enough for what looks at a file several times, too short to be
// noticed by who changes it on the host.
const trustSeconds = "0.1"

// virtiofsdArgs are the arguments of either dialect. Both make themselves
// namespaces with the shared directory as root, and tell the guest of mount
// points below it, so that each has a device number of its own there. They hold a
// file open for each one that the guest knows, for which the limit of a service is
// far too low.
//
// With "auto" a guest forgets what it has read of a file, and of a program that
// runs, whenever it is opened again. The C daemon can do better: a guest keeps
// what it has, looks at the file's attributes once it trusts them no longer, and
// forgets it all when they have changed (FUSE_AUTO_INVAL_DATA). The Rust one has
// no such choice: with "always" it lets the guest trust for a day.
func virtiofsdArgs(dialect, cache string, share hypervisor.Share, listener int, files uint64) []string {
	if cache == "" {
		cache = "auto"
	}
	if dialect == DialectRust {
		return []string{
			fmt.Sprintf("--fd=%d", listener), "--shared-dir=" + share.Dir, "--cache=" + cache,
			"--sandbox=namespace", "--announce-submounts", "--xattr",
			fmt.Sprintf("--rlimit-nofile=%d", files), "--log-level=warn",
		}
	}
	switch cache {
	case "auto":
		cache = "always,timeout=" + trustSeconds
	case "never":
		cache = "none"
	}
	return []string{
		fmt.Sprintf("--fd=%d", listener), fmt.Sprintf("--rlimit-nofile=%d", files),
		"-o", "source=" + optionEscape.Replace(share.Dir), "-o", "cache=" + cache, "-o", "sandbox=namespace",
		"-o", "announce_submounts", "-o", "xattr", "-o", "log_level=warn",
	}
}

// maxFiles is what virtiofsd itself asks for where it may.
const maxFiles = 1_000_000

// fileLimit is how many files a child may have open: more takes a capability. Zero
// leaves it as it is.
func fileLimit() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return min(limit.Max, maxFiles)
}

// optionEscape makes a path one option of the C dialect (libfuse's fuse_opt).
var optionEscape = strings.NewReplacer(`\`, `\\`, `,`, `\,`)

// startVirtiofsd runs the back end of a share and returns QEMU's end of the
// connection to it. Nothing is waited for: the connection sits in the
// listener's backlog until virtiofsd takes it. The name is that of a socket in
// the sandbox's directory, for a moment.
func (vm *VM) startVirtiofsd(name string, share hypervisor.Share, optional bool) (*process, *os.File, error) {
	host := vm.opts.Host
	if host.Virtiofsd == "" {
		return nil, nil, missing("virtiofsd", exec.ErrNotFound, "install virtiofsd (Debian 13) or qemu-system-common (Debian 12)")
	}
	listener, conn, err := connectedListener(filepath.Join(vm.opts.Dir, name))
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	c := command{role: roleVirtiofsd, path: host.Virtiofsd, optional: optional}
	c.args = virtiofsdArgs(host.VirtiofsdDialect, vm.opts.Config.VirtiofsdCache, share, c.files.add(listener), fileLimit())
	p, err := vm.start(c)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return p, conn, nil
}

// connectedListener makes a listening socket and the one connection it is for.
// The path exists no longer than that takes.
func connectedListener(path string) (listener, conn *os.File, err error) {
	l, err := listenUnix(path)
	if err != nil {
		return nil, nil, err
	}
	defer l.Close() // removes the path
	if conn, err = dialFile(path); err != nil {
		return nil, nil, err
	}
	if listener, err = l.File(); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return listener, conn, nil
}

func listenUnix(path string) (*net.UnixListener, error) {
	return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
}

// dialFile connects to a socket as a file, for somebody else to use. It does
// not wait: a stream socket connects when there is room in the backlog.
func dialFile(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "connect", Path: path, Err: err}
	}
	_ = unix.SetNonblock(fd, false) // QEMU sets what it wants
	return os.NewFile(uintptr(fd), path), nil
}

// The files of vhost-device-vsock, in a directory of its own that belongs to
// its user: agent connections go to streams, the guest's to streams_PORT.
const (
	vsockDir     = "v"
	vsockControl = "c"
	vsockStreams = "g"
)

// startVhostDeviceVsock runs the daemon and returns QEMU's end of the
// connection to it. The daemon can't be handed a socket, but finds its
// directory by number.
func (vm *VM) startVhostDeviceVsock(ctx context.Context) (*os.File, error) {
	path := filepath.Join(vm.opts.Dir, vsockDir)
	dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	made, err := watchDir(path)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	// The kernel ends a watch only after a grace period of SRCU (some 13 ms), for
	// which QEMU need not wait.
	defer vm.watchers.Go(func() { _ = made.Close() })

	c := command{role: roleVsock, path: vm.opts.Host.VhostDeviceVsock, user: vm.user, flags: isolation()}
	at := fdPath(c.files.add(dir))
	c.args = []string{
		fmt.Sprintf("--guest-cid=%d", hybridCID), "--socket=" + filepath.Join(at, vsockControl),
		"--uds-path=" + filepath.Join(at, vsockStreams), fmt.Sprintf("--tx-buffer-size=%d", vsockBuffer),
	}
	if _, err := vm.start(c); err != nil {
		return nil, err
	}
	control := filepath.Join(path, vsockControl)
	conn, err := made.dial(ctx, control)
	if err != nil {
		return nil, fmt.Errorf("connect %s: %w", roleVsock, err)
	}
	return conn, os.Remove(control)
}

// A dirWatch tells of new names in a directory.
type dirWatch struct{ *os.File }

func watchDir(path string) (dirWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return dirWatch{}, err
	}
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_CREATE); err != nil {
		unix.Close(fd)
		return dirWatch{}, err
	}
	return dirWatch{os.NewFile(uintptr(fd), "inotify")}, nil // non-blocking: reads obey deadlines
}

// bindToListen bounds the time between the two calls of a server, of which
// only the first can be seen from outside.
const bindToListen = time.Second

// dial connects to a socket that somebody is about to make in the directory.
func (w dirWatch) dial(ctx context.Context, path string) (*os.File, error) {
	stop := context.AfterFunc(ctx, func() { _ = w.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	events := make([]byte, 4096)
	for pause := 100 * time.Microsecond; ; {
		conn, err := dialFile(path)
		switch {
		case err == nil:
			return conn, nil
		case errors.Is(err, unix.ENOENT):
			if _, err := w.Read(events); err != nil {
				if ctx.Err() != nil {
					return nil, context.Cause(ctx)
				}
				return nil, err
			}
		case errors.Is(err, unix.ECONNREFUSED) && pause < bindToListen:
			// Bound, but not listening yet: nothing tells when it does.
			select {
			case <-time.After(pause):
				pause *= 2
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		default:
			return nil, err
		}
	}
}

// openVhostVsock opens the kernel's device and finds a context id that is free:
// only the kernel knows. Pick proposes one.
func openVhostVsock(pick func() uint32) (device *os.File, cid uint32, err error) {
	const path = "/dev/vhost-vsock"
	device, err = os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	for range 64 {
		cid = pick()
		switch err := setGuestCID(device, cid); {
		case err == nil:
			return device, cid, nil
		case !errors.Is(err, unix.EADDRINUSE):
			device.Close()
			return nil, 0, &os.PathError{Op: "set guest cid", Path: path, Err: err}
		}
	}
	device.Close()
	return nil, 0, fmt.Errorf("find a free context id: %w", errdefs.ErrResourceExhausted)
}

// isolation is the namespaces of processes that need nothing of the host's:
// no network, no shared memory of others.
func isolation() uintptr {
	if os.Geteuid() != 0 {
		return 0
	}
	return syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS
}
