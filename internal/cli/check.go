package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/network"
)

// The outcomes of a check.
const (
	statusOK      = "ok"
	statusWarning = "warning" // works, at a price
	statusMissing = "missing" // no container can start
)

// A finding is one line of 'vmshim check'.
type finding struct {
	Name   string `json:"name"`
	Status string `json:"status"`
	Detail string `json:"detail"`
}

// A report collects findings.
type report struct{ findings []finding }

func (r *report) add(name, status, format string, args ...any) {
	r.findings = append(r.findings, finding{name, status, fmt.Sprintf(format, args...)})
}

func check(ctx context.Context, c *call) error {
	var r report
	r.host()
	cfg, err := config.Load(c.configPath)
	if err != nil {
		r.faults("configuration", err)
		return r.print(c)
	}
	r.configuration(c.configPath, cfg)
	r.machine(ctx, cfg)
	r.network(cfg.Sandbox.Network)
	r.file("kernel", cfg.Sandbox.Machine.Kernel)
	r.file("initrd", cfg.Sandbox.Machine.Initrd)
	r.shim()
	return r.print(c)
}

func (r *report) print(c *call) error {
	ok := true
	rows := [][]string{{"CHECK", "STATUS", "DETAIL"}}
	for _, f := range r.findings {
		rows = append(rows, []string{f.Name, f.Status, f.Detail})
		ok = ok && f.Status != statusMissing
	}
	v := struct {
		OK     bool      `json:"ok"`
		Checks []finding `json:"checks"`
	}{ok, r.findings}
	if err := c.print(v, rows); err != nil {
		return err
	}
	if !ok {
		return errFailed
	}
	return nil
}

func (r *report) host() {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		r.add("host", statusMissing, "uname: %v", err)
		return
	}
	var memory unix.Sysinfo_t
	_ = unix.Sysinfo(&memory) // cannot fail with a valid pointer
	r.add("host", statusOK, "%s, Linux %s, %d CPUs, %d MiB", runtime.GOARCH, text(name.Release[:]), runtime.NumCPU(), memory.Totalram*uint64(memory.Unit)>>20)
	if os.Geteuid() != 0 {
		r.add("user", statusWarning, "not root: containerd runs the shim as root, which may find more than this check")
	}
	r.add("cgroups", statusOK, "version %d", cgroupVersion("/sys/fs/cgroup"))
}

func cgroupVersion(root string) int {
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
		return 2
	}
	return 1
}

func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func (r *report) configuration(path string, cfg config.Config) {
	if path == "" {
		path = os.Getenv(config.Env)
	}
	if path == "" {
		path = config.Path
		if _, err := os.Stat(path); err != nil {
			path = "defaults (no " + path + ")"
		}
	}
	r.add("configuration", statusOK, "%s", path)
	for _, w := range cfg.Warnings {
		r.add("configuration", statusWarning, "%s", w)
	}
}

// machine is what the shim itself decides by.
func (r *report) machine(ctx context.Context, cfg config.Config) {
	host, err := qemu.Probe(ctx, cfg.QEMU)
	if err != nil {
		r.faults("machine", err)
	}
	if host == nil {
		return
	}
	if host.QEMU != "" {
		r.add("qemu", statusOK, "%s, version %s, machine type %s", host.QEMU, host.Version, host.Machine)
	}
	if host.Accelerator != "" {
		r.add("accelerator", statusOK, "%s", host.Accelerator)
	}
	switch host.Vsock {
	case qemu.VsockKernel:
		r.add("vsock", statusOK, "the kernel's")
	case qemu.VsockVhostUser:
		r.add("vsock", statusOK, "%s", host.VhostDeviceVsock)
	}
	if host.Virtiofsd != "" {
		r.add("virtiofsd", statusOK, "%s (%s)", host.Virtiofsd, host.VirtiofsdDialect)
	}
	for _, w := range host.Warnings {
		r.add("machine", statusWarning, "%s", w)
	}
	if err == nil {
		r.templates(cfg, host)
	}
}

// templates says which sandboxes need not boot. What is wrong with the files of
// the guest is told of these.
func (r *report) templates(cfg config.Config, host *qemu.Host) {
	list, err := findTemplates(cfg, host)
	if err != nil {
		return
	}
	var found []string
	for _, t := range list {
		switch {
		case t.Path != "":
			found = append(found, t.For)
		case t.Failed != "":
			r.add("templates", statusWarning, "none for a %s, which boots: %s", t.For, t.Failed)
		}
	}
	switch {
	case len(found) > 0:
		r.add("templates", statusOK, "for a %s without limits, in %s", strings.Join(found, " and a "), cfg.QEMU.TemplateDir)
	case cfg.QEMU.MakesTemplates(*host):
		r.add("templates", statusOK, "none yet: the first sandbox makes one")
	default:
		r.add("templates", statusOK, "none: every machine boots ('vmshim make-templates' changes that)")
	}
}

// network tries what the shim does with a pod's interface.
func (r *report) network(cfg network.Config) {
	if cfg.Model == network.None {
		r.add("network", statusOK, "none, as configured")
		return
	}
	vhost, err := network.Try(cfg)
	switch {
	case errors.Is(err, unix.EPERM) && os.Geteuid() != 0:
		r.add("network", statusWarning, "not tried: %v", err)
	case err != nil:
		r.add("network", statusMissing, "%s: %v", cfg.Model, err)
	case !vhost:
		r.add("network", statusOK, "%s; QEMU moves the packets (no vhost-net)", cfg.Model)
	default:
		r.add("network", statusOK, "%s, vhost-net", cfg.Model)
	}
}

// faults adds a finding for each of the errors that were joined.
func (r *report) faults(name string, err error) {
	all := []error{err}
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		all = joined.Unwrap()
	}
	for _, err := range all {
		r.add(name, statusMissing, "%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}

// file checks a part of the guest image, which has a key in the configuration.
func (r *report) file(key, path string) {
	info, err := os.Stat(path)
	if err != nil {
		r.add(key, statusMissing, "%v; 'make install' puts it there, or set machine.%s in the configuration", err, key)
		return
	}
	r.add(key, statusOK, "%s, %d KiB", path, info.Size()>>10)
}

// shim looks where containerd does: in PATH, which may differ from ours.
func (r *report) shim() {
	const binary = "containerd-shim-vm-v2"
	path, err := exec.LookPath(binary)
	if err != nil {
		r.add("shim", statusWarning, "no %s in PATH, where containerd looks for it", binary)
		return
	}
	r.add("shim", statusOK, "%s", path)
}
