package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
)

// Values of Host, and of Config besides "auto" and "".
const (
	KVM = "kvm"
	TCG = "tcg"

	VsockKernel    = "kernel"     // /dev/vhost-vsock
	VsockVhostUser = "vhost-user" // vhost-device-vsock

	DialectC    = "c"    // of QEMU up to 7.2
	DialectRust = "rust" // gitlab.com/virtio-fs/virtiofsd
)

// Host is what was found on this machine.
type Host struct {
	Arch             string
	QEMU             string // path
	Version          string // "7.2.22"
	Machine          string // versioned machine type
	Accelerator      string // "kvm" or "tcg"
	Vsock            string // "kernel" or "vhost-user"
	VhostDeviceVsock string
	Virtiofsd        string   // empty when there is none: only shares need it
	VirtiofsdDialect string   // "c" or "rust"
	Warnings         []string // what was chosen for want of better, and what it costs
}

// Probe looks at the host and decides. An error names everything that is
// missing, and how to get it; the Host has what was found all the same.
func Probe(ctx context.Context, cfg Config) (*Host, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	h := &Host{Arch: runtime.GOARCH}
	p := prober{cfg: cfg, host: h, root: "/", learned: openCache(cfg.CacheDir)}
	if err := p.all(ctx); err != nil {
		return h, fmt.Errorf("probe host: %w", err)
	}
	p.learned.save(ctx)
	return h, nil
}

type prober struct {
	cfg     Config
	host    *Host
	root    string // of /dev and /proc
	learned *cache
}

func (p *prober) all(ctx context.Context) error {
	return errors.Join(p.qemu(ctx), p.accelerator(), p.vsock(), p.virtiofsd(ctx))
}

// A MissingError is something that this host lacks. Its class is
// ErrFailedPrecondition.
type MissingError struct {
	What   string // "qemu", "kvm", "vsock", "virtiofsd"
	Err    error
	Remedy string // how to get it
}

func (e *MissingError) Error() string { return fmt.Sprintf("%s: %v: %s", e.What, e.Err, e.Remedy) }

// Unwrap gives the cause and the class.
func (e *MissingError) Unwrap() []error { return []error{e.Err, errdefs.ErrFailedPrecondition} }

func missing(what string, err error, remedy string) error {
	return &MissingError{What: what, Err: err, Remedy: remedy}
}

func (p *prober) warn(format string, args ...any) {
	p.host.Warnings = append(p.host.Warnings, fmt.Sprintf(format, args...))
}

func (p *prober) qemu(ctx context.Context) error {
	name, pkg, board := "qemu-system-x86_64", "qemu-system-x86", "q35"
	if p.host.Arch == "arm64" {
		name, pkg, board = "qemu-system-aarch64", "qemu-system-arm", "virt"
	}
	path, err := find(p.cfg.Path, name)
	if err != nil {
		return missing("qemu", err, "install "+pkg+" (Debian's name), or set the path in the configuration")
	}
	about, err := p.learned.qemu(ctx, path)
	if err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	p.host.QEMU, p.host.Version = path, about.Version
	p.host.Machine = p.cfg.Machine
	if p.host.Machine == "" {
		p.host.Machine = about.Aliases[board]
	}
	if p.host.Machine == "" {
		return missing("qemu", fmt.Errorf("%s has no machine type %s", path, board), "install "+pkg)
	}
	return nil
}

func (p *prober) accelerator() error {
	if p.cfg.Accelerator == TCG {
		p.host.Accelerator = TCG
		return nil
	}
	err := p.kvm()
	switch {
	case err == nil:
		p.host.Accelerator = KVM
	case p.cfg.Accelerator == KVM:
		return missing("kvm", err, kvmRemedy(err))
	default:
		p.host.Accelerator = TCG
		p.warn("no kvm (%v): tcg emulates every instruction, 10 to 50 times slower", err)
	}
	return nil
}

// kvmRemedy is about the device's permissions where those are the reason.
func kvmRemedy(err error) string {
	var private *privateDeviceError
	if errors.As(err, &private) || errors.Is(err, fs.ErrPermission) {
		return "QEMU runs as a user of its own, who must be able to open it"
	}
	return "enable virtualization in the firmware (nested, in a virtual machine) and load kvm_intel or kvm_amd"
}

// kvm says why KVM can't be used. A /dev/kvm that opens proves nothing:
// paravirtual ones exist that no stock guest boots on.
func (p *prober) kvm() error {
	path := filepath.Join(p.root, "dev/kvm")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if p.host.Arch == "amd64" {
		flags, err := cpuFlags(filepath.Join(p.root, "proc/cpuinfo"))
		if err != nil {
			return err
		}
		if !flags["vmx"] && !flags["svm"] {
			return errors.New("the cpu shows neither vmx nor svm")
		}
	}
	if p.cfg.unprivileged() {
		if _, err := deviceGroup(path); err != nil {
			return err
		}
	}
	return nil
}

func cpuFlags(path string) (map[string]bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	flags := map[string]bool{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if strings.TrimSpace(key) == "flags" {
			for flag := range strings.FieldsSeq(value) {
				flags[flag] = true
			}
			return flags, nil // the other CPUs have the same
		}
	}
	return flags, lines.Err()
}

func (p *prober) vsock() error {
	kernel := p.vhostVsock()
	if kernel == nil && p.cfg.Vsock != VsockVhostUser {
		p.host.Vsock = VsockKernel
		return nil
	}
	if p.cfg.Vsock == VsockKernel {
		return missing("vsock", kernel, "load the module vhost_vsock")
	}
	path, err := find(p.cfg.VhostDeviceVsock, "vhost-device-vsock", vsockDirs...)
	if err != nil {
		return missing("vsock", errors.Join(kernel, err), "load the module vhost_vsock, or install vhost-device-vsock (rust-vmm; hack/fetch-vhost-device-vsock)")
	}
	p.host.Vsock, p.host.VhostDeviceVsock = VsockVhostUser, path
	if p.cfg.Vsock != VsockVhostUser {
		p.warn("no vsock in the kernel (%v): vhost-device-vsock carries it, one more process for each machine", kernel)
	}
	return nil
}

// vsockDirs are where vhost-device-vsock may be besides PATH.
var vsockDirs = []string{"/usr/libexec", "/usr/local/libexec/vmshim"}

func (p *prober) vhostVsock() error {
	f, err := os.OpenFile(filepath.Join(p.root, "dev/vhost-vsock"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func (p *prober) virtiofsd(ctx context.Context) error {
	path, err := find(p.cfg.Virtiofsd, "virtiofsd", "/usr/libexec", "/usr/lib/qemu", "/usr/lib", "/usr/local/libexec")
	if errors.Is(err, exec.ErrNotFound) && p.cfg.Virtiofsd == "" {
		p.warn("no virtiofsd: nothing can be shared with a guest; install virtiofsd (Debian 13) or qemu-system-common (Debian 12)")
		return nil
	}
	if err != nil {
		return missing("virtiofsd", err, "correct the path in the configuration")
	}
	about, err := p.learned.virtiofsd(ctx, path)
	if err != nil {
		return fmt.Errorf("virtiofsd: %w", err)
	}
	p.host.Virtiofsd, p.host.VirtiofsdDialect = path, about.Dialect
	return nil
}

// find looks for a binary: where the operator says, and nowhere else then; in
// PATH; in further directories.
func find(configured, name string, dirs ...string) (string, error) {
	if configured != "" {
		return executable(configured)
	}
	if path, err := exec.LookPath(name); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range dirs {
		if path, err := executable(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

func executable(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.IsDir() || info.Mode()&0o111 == 0 {
		return "", &fs.PathError{Op: "exec", Path: path, Err: fs.ErrPermission}
	}
	return path, nil
}
