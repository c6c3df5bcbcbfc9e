package guest

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/thread"
)

// A namespace that is kept open has a path by which libcontainer can join it.
type namespace struct{ file *os.File }

func (n *namespace) path() string {
	if n == nil {
		return ""
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
}

func (n *namespace) close() error {
	if n == nil {
		return nil
	}
	return n.file.Close()
}

// control calls f with the descriptor, which stays open meanwhile.
func (n *namespace) control(f func(fd int)) error {
	conn, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Control(func(fd uintptr) { f(int(fd)) })
}

// enter makes it the calling thread's, whatever its kind.
func (n *namespace) enter() error {
	var err error
	if cerr := n.control(func(fd int) { err = unix.Setns(fd, 0) }); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("enter namespace: %w", err)
	}
	return nil
}

// openNamespace keeps a namespace of the calling thread, or of a process.
func openNamespace(path string) (*namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &namespace{f}, nil
}

// pinned are the namespaces that all containers of the sandbox join, beside its
// network. The agent is in none of them: containers may change net.* sysctls, and
// the pod's network does not reach the agent.
type pinned struct{ ipc, uts *namespace }

func (p *pinned) close() error { return errors.Join(p.ipc.close(), p.uts.close()) }

// pinNamespaces makes them, with the hostname set.
func pinNamespaces(hostname string) (*pinned, error) {
	var p pinned
	err := thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("unshare namespaces: %w", err)
		}
		if hostname != "" {
			if err := unix.Sethostname([]byte(hostname)); err != nil {
				return fmt.Errorf("set hostname %q: %w", hostname, err)
			}
		}
		var err error
		if p.ipc, err = openNamespace("/proc/thread-self/ns/ipc"); err != nil {
			return err
		}
		p.uts, err = openNamespace("/proc/thread-self/ns/uts")
		return err
	})
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	return &p, nil
}

// pinNetwork makes a network namespace, with the loopback device up.
func pinNetwork() (*namespace, error) {
	var ns *namespace
	err := thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network: %w", err)
		}
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("bring loopback up: %w", err)
		}
		var err error
		ns, err = openNamespace("/proc/thread-self/ns/net")
		return err
	})
	return ns, err
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// mountNamespace makes a mount namespace in which mount was called. The
// container gets its root file system there and not in the agent's own mounts:
// libcontainer changes to that directory between fork and exec, when a dead file
// system would stop the whole agent.
func mountNamespace(mount func() error) (*namespace, error) {
	var ns *namespace
	err := thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare mounts: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		if err := mount(); err != nil {
			return err
		}
		var err error
		ns, err = openNamespace("/proc/thread-self/ns/mnt")
		return err
	})
	return ns, err
}
