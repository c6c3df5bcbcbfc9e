package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// isolated tells a program, run again, that it is in its namespaces.
const isolated = "VMSHIM_TEST_ISOLATED"

// Network is a CNI configuration list for pods: a bridge that is nobody else's
// where the program is isolated. CNI remembers addresses in a directory.
const Network = `{"cniVersion": "1.0.0", "name": "vmshim", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}`

// Isolate runs the program again in network and mount namespaces of its own,
// and returns how that ended. Where it is in them already, it makes them what a
// host's are and returns false: mounts propagate, the loopback device is up, and
// what CNI remembers goes with the namespaces.
func Isolate(ctx context.Context) (code int, done bool, err error) {
	if os.Getenv(isolated) != "" {
		return 0, false, settle()
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	err = cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		return 1, true, fmt.Errorf("run in namespaces of its own: %w", err)
	}
	return cmd.ProcessState.ExitCode(), true, nil
}

func settle() error {
	const cni = "/var/lib/cni"
	if err := os.MkdirAll(cni, 0o755); err != nil {
		return err
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"", "/", "", unix.MS_REC | unix.MS_SHARED},
		{"cni", cni, "tmpfs", 0},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return &os.PathError{Op: "mount", Path: m.target, Err: err}
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	return netlink.LinkSetUp(lo)
}
