package guest

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
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

// openNamespace keeps a namespace of the calling thread, or of a process.
func openNamespace(path string) (*namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &namespace{f}, nil
}

// pinned are the namespaces that all containers of the sandbox join. The agent
// is in none of them: containers may change net.* sysctls, and the pod's network
// does not reach the agent.
type pinned struct{ net, ipc, uts *namespace }

func (p *pinned) close() error {
	return errors.Join(p.net.close(), p.ipc.close(), p.uts.close())
}

// pinNamespaces makes them, with the loopback device up and the hostname set.
func pinNamespaces(hostname string) (*pinned, error) {
	var p pinned
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("unshare namespaces: %w", err)
		}
		if hostname != "" {
			if err := unix.Sethostname([]byte(hostname)); err != nil {
				return fmt.Errorf("set hostname %q: %w", hostname, err)
			}
		}
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("bring loopback up: %w", err)
		}
		for _, ns := range []struct {
			name string
			to   **namespace
		}{{"net", &p.net}, {"ipc", &p.ipc}, {"uts", &p.uts}} {
			var err error
			if *ns.to, err = openNamespace("/proc/thread-self/ns/" + ns.name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	return &p, nil
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
	err := onThread(func() error {
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

// onThread calls f on a thread of its own that ends afterwards, whatever f did
// to it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock
		done <- f()
	}()
	return <-done
}
