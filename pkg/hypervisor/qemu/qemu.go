// Package qemu makes a running machine of a hypervisor.Spec.
package qemu

import (
	"context"
	"net"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// Config is what the operator wishes. Empty strings choose by themselves.
type Config struct {
	Path             string // QEMU's binary; empty: qemu-system-<arch> in PATH
	Accelerator      string // "auto", "kvm" or "tcg"
	Vsock            string // "auto", "kernel" or "vhost-user"
	Machine          string // machine type; empty: the newest versioned q35 (virt on arm64)
	CPU              string // -cpu; empty: host under KVM, max under TCG
	VhostDeviceVsock string // vhost-device-vsock's binary; empty: in PATH
	Virtiofsd        string // virtiofsd's binary; empty: the places where distributions put it
	VirtiofsdCache   string // "auto", "always", "never"
	UIDBase          uint32 // QEMU runs as UIDBase + the pid of its parent; 0: as the caller
}

// Host is what was found on this machine.
type Host struct {
	Arch             string
	QEMU             string // path
	Version          string // "7.2.22"
	Machine          string // versioned machine type
	Accelerator      string // "kvm" or "tcg"
	Vsock            string // "kernel" or "vhost-user"
	VhostDeviceVsock string
	Virtiofsd        string
	VirtiofsdDialect string   // "c" or "rust"
	Warnings         []string // what was chosen for want of better, and what it costs
}

// Probe looks at the host and decides.
func Probe(ctx context.Context, cfg Config) (*Host, error) { return nil, errdefs.ErrNotImplemented }

// Options are what Start needs besides the description of the machine.
type Options struct {
	Config Config
	Host   *Host
	// Dir is the sandbox's directory: sockets with names of at most 12 bytes go there.
	Dir string
	// Env is added to the environment of every process that is started, so that
	// they can be found by it after a crash.
	Env []string
	// Started is called with each process as soon as it runs, before the next step.
	Started func(hypervisor.Process) error
	// CgroupFD, when positive, is the directory of a version 2 control group
	// that every process is born in.
	CgroupFD int
}

// A VM is a running machine: QEMU and its helpers, owned by this process.
type VM struct{}

// Start runs the machine. It returns when QEMU answers on QMP and the vCPUs
// run; the guest is then booting.
func Start(ctx context.Context, spec hypervisor.Spec, opts Options) (*VM, error) {
	return nil, errdefs.ErrNotImplemented
}

// Ready is closed when the guest's agent said that it serves.
func (vm *VM) Ready() <-chan struct{} { return nil }

// Dial opens a stream to a port of the guest.
func (vm *VM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return nil, errdefs.ErrNotImplemented
}

// AgentURL names a port of the guest for another process: vsock://… or hvsock://….
func (vm *VM) AgentURL(port uint32) string { return "" }

// Done is closed when the machine is gone: QEMU or a helper that it cannot do
// without has ended, and the rest was killed and reaped.
func (vm *VM) Done() <-chan struct{} { return nil }

// Err says why the machine is gone, with the tail of the console and of
// QEMU's stderr; nil after Shutdown. Valid after Done.
func (vm *VM) Err() error { return nil }

// Shutdown waits for the guest to power off by itself (the agent was told so),
// asks by ACPI when it does not within half of the context's time, and kills in the end.
func (vm *VM) Shutdown(ctx context.Context) error { return nil }

// Kill ends every process of the machine and returns when they are reaped.
func (vm *VM) Kill() error { return nil }

// Console returns the last lines of the guest's console, quoted for a log.
func (vm *VM) Console() string { return "" }

// Processes lists the host processes of the machine.
func (vm *VM) Processes() []hypervisor.Process { return nil }
