// Package qemu makes a running machine of a hypervisor.Spec.
//
//   - Probe looks at the host: QEMU, accelerator, vsock, virtiofsd.
//   - Start runs the helpers that the machine needs, then QEMU, and returns
//     when QEMU answers on QMP; the guest is booting then, or goes on from a
//     template.
//   - Ready, Dial, Console are the way into the guest.
//   - Plug…, Unplug…, Grow… and Resize… change the running machine.
//   - A machine ends by itself, by Shutdown or by Kill. The first of its
//     processes to end takes the others down; when all of them are reaped and
//     everything is removed, Done is closed and Err says why.
//
// The VM owns its processes (through pidfds), one QMP connection, the console
// and its files in the sandbox's directory, and joins its goroutines before
// Done. QEMU and vhost-device-vsock run as a user of their own without any
// right to the host: everything they use is handed over by descriptor.
//
// Arguments (args.go, params.go, helpers.go) are functions of plain values.
package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// Config is what the operator wishes. Empty strings choose by themselves.
type Config struct {
	Path             string // QEMU's binary; empty: qemu-system-<arch> in PATH
	Accelerator      string // "auto", "kvm" or "tcg"
	Vsock            string // "auto", "kernel" or "vhost-user"
	Machine          string // machine type; empty: the newest versioned q35 (virt on arm64)
	CPU              string // -cpu; empty: host under KVM, max without what is slow to emulate under TCG
	VhostDeviceVsock string // vhost-device-vsock's binary; empty: in PATH
	Virtiofsd        string // virtiofsd's binary; empty: the places where distributions put it
	VirtiofsdCache   string // "auto", "always", "never"
	UIDBase          uint32 // QEMU runs as UIDBase + the pid of its parent; 0: as the caller
	// CacheDir is where Probe keeps what binaries say of themselves, for the
	// next process: the root of the state. Empty: nowhere.
	CacheDir string
	// TemplateDir is where templates of machines are (see MakeTemplate): Start goes
	// on from the one that fits, if there is one. Empty: every machine boots.
	TemplateDir string
	// MakeTemplates says when EnsureTemplate makes one that is not there:
	// MakeEmulated is under TCG, where a boot is slow and a machine no wall against
	// its guest in the first place. Empty: MakeNever.
	MakeTemplates string
}

// Validate reports every fault at once.
func (c Config) Validate() error {
	var errs []error
	for _, choice := range []struct {
		name, value string
		of          []string
	}{
		{"accelerator", c.Accelerator, []string{"", "auto", KVM, TCG}},
		{"vsock", c.Vsock, []string{"", "auto", VsockKernel, VsockVhostUser}},
		{"virtiofsd cache", c.VirtiofsdCache, []string{"", "auto", "always", "never"}},
		{"making of templates", c.MakeTemplates, []string{"", MakeEmulated, MakeAlways, MakeNever}},
	} {
		if !slices.Contains(choice.of, choice.value) {
			errs = append(errs, fmt.Errorf("qemu: %s %q is not one of %q", choice.name, choice.value, choice.of[1:]))
		}
	}
	return errors.Join(errs...)
}

// unprivileged says whether QEMU runs as a user of its own.
func (c Config) unprivileged() bool { return c.UIDBase != 0 && os.Geteuid() == 0 }

// user is who QEMU runs as; nil is the caller. Pids are unique, so the sum is.
func (c Config) user(accelerator string) (*syscall.Credential, error) {
	if !c.unprivileged() {
		return nil, nil
	}
	id := c.UIDBase + uint32(os.Getpid())
	user := &syscall.Credential{Uid: id, Gid: id}
	if accelerator == KVM {
		// QEMU opens the device by name.
		group, err := deviceGroup("/dev/kvm")
		if err != nil {
			return nil, err
		}
		if group != 0 {
			user.Groups = []uint32{group}
		}
	}
	return user, nil
}

// deviceGroup is the group that makes a device usable for somebody who is
// nobody; 0 when none is needed.
func deviceGroup(path string) (uint32, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case stat.Mode&0o006 == 0o006:
		return 0, nil
	case stat.Mode&0o060 == 0o060 && stat.Gid != 0:
		return stat.Gid, nil
	}
	return 0, &privateDeviceError{path}
}

// A privateDeviceError says that nobody but root can use a device.
type privateDeviceError struct{ path string }

func (e *privateDeviceError) Error() string {
	return fmt.Sprintf("%s is for root only: give it a group (chgrp kvm %[1]s; chmod 660 %[1]s)", e.path)
}

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

	extra  []string // further arguments for QEMU, from tests
	making bool     // a template: the machine has to boot
}

// commandLineSize is where kernels cut their command line (COMMAND_LINE_SIZE
// of x86 and arm64), zero byte included.
const commandLineSize = 2048

func (o Options) validate(spec hypervisor.Spec) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	errs = append(errs, spec.Validate(), o.Config.Validate())
	if o.Host == nil {
		bad("host was not probed")
	} else if spec.Arch != o.Host.Arch {
		bad("architecture %s on a host of %s", spec.Arch, o.Host.Arch)
	}
	if !filepath.IsAbs(o.Dir) {
		bad("directory %q is not absolute", o.Dir)
	}
	if n := len(strings.Join(kernelParams(spec, TCG), " ")); n >= commandLineSize {
		bad("%d bytes of kernel parameters, more than %d", n, commandLineSize-1)
	}
	if n := len(spec.Shares); n > maxShares {
		bad("%d shares, more than %d", n, maxShares)
	}
	if n := len(spec.Disks); n > maxDisks {
		bad("%d disks at boot, more than %d", n, maxDisks)
	}
	return errors.Join(errs...)
}
