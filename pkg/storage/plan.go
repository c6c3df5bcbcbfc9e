package storage

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// A Container is what is to be planned.
type Container struct {
	ID     string
	Bundle string
	// Rootfs makes the root file system; when empty, Root.Path has it already.
	Rootfs []Mount
	Root   *specs.Root
	Mounts []specs.Mount
	// Shm is the host's directory that stands for the sandbox's /dev/shm; empty:
	// whatever is bound there does.
	Shm string
	// HugePages are the container's limits of them.
	HugePages []specs.LinuxHugepageLimit
}

// Facts are what a plan needs to know of the host; see Look.
type Facts struct {
	Share string // the directory that the guest mounts at GuestDir
	// Modes has the kind of each source of a bind mount, by its absolute path.
	// What is missing does not exist.
	Modes map[string]fs.FileMode
	// Submounts has the sources below which something else is mounted.
	Submounts map[string]bool
	// HugePages has the size in bytes of the pages of sources that are of those.
	HugePages map[string]uint64
	// Setattr says that the kernel has mount_setattr(2), which recursive
	// read-only mounts need.
	Setattr bool
}

// A Plan is how a container gets its files.
type Plan struct {
	Dir  string      // on the host: the container's directory below the share
	Host []HostMount // to be made on the host, in this order

	Root     string              // in the guest: the root file system
	Storages []*protocol.Storage // to be made in the guest; disks belong here
	Mounts   []specs.Mount       // as the guest's runtime makes them, in the specification's order

	Warnings []string // what the container gets otherwise than it asked for
}

// HostRoot is the root file system on the host.
func (p *Plan) HostRoot() string { return filepath.Join(p.Dir, rootName) }

// A HostMount is something mounted at a name in Plan.Dir.
type HostMount struct {
	Name   string
	File   bool    // a file, not a directory, is mounted
	Mounts []Mount // either these, one upon the other,
	Bind   *Bind   // or this
}

// A Bind is a bind mount. Unless Slave is set, it takes no part in what is
// mounted on the host later.
type Bind struct {
	Source            string
	Recursive         bool
	ReadOnly          bool
	RecursiveReadOnly bool
	Slave             bool
}

// rootName is the root file system's in Plan.Dir; other mounts have numbers.
const rootName = "rootfs"

// NewPlan decides. Errors are errdefs.ErrInvalidArgument, ErrNotFound for what
// is missing on the host, and ErrNotImplemented for what cannot cross the
// boundary of a machine.
func NewPlan(c Container, f Facts) (*Plan, error) {
	if !plainName(c.ID) {
		return nil, fmt.Errorf("container id %q: %w", c.ID, errdefs.ErrInvalidArgument)
	}
	p := &Plan{Dir: filepath.Join(f.Share, c.ID), Root: path.Join(GuestDir, c.ID, rootName)}
	root, err := planRoot(c, f)
	if err != nil {
		return nil, err
	}
	p.Host = append(p.Host, root)
	for i, m := range c.Mounts {
		if err := p.add(c, f, strconv.Itoa(i), m); err != nil {
			return nil, fmt.Errorf("mount %d at %q: %w", i, m.Destination, err)
		}
	}
	return p, nil
}

// planRoot puts the root file system on the host. Snapshotters that give a
// block device or an EROFS image are mounted on the host as well.
func planRoot(c Container, f Facts) (HostMount, error) {
	if len(c.Rootfs) > 0 {
		return HostMount{Name: rootName, Mounts: c.Rootfs}, nil
	}
	if c.Root == nil || c.Root.Path == "" {
		return HostMount{}, fmt.Errorf("no root file system: %w", errdefs.ErrInvalidArgument)
	}
	source := absolute(c.Bundle, c.Root.Path)
	if mode, ok := f.Modes[source]; !ok {
		return HostMount{}, fmt.Errorf("root file system %q: %w", source, errdefs.ErrNotFound)
	} else if !mode.IsDir() {
		return HostMount{}, fmt.Errorf("root file system %q is not a directory: %w", source, errdefs.ErrInvalidArgument)
	}
	return HostMount{Name: rootName, Bind: &Bind{Source: source, Recursive: true}}, nil
}

// add plans one mount of the specification.
func (p *Plan) add(c Container, f Facts, name string, m specs.Mount) error {
	if len(m.UIDMappings)+len(m.GIDMappings) > 0 || has(m.Options, "idmap", "ridmap") {
		return fmt.Errorf("id-mapped mounts are not supported: %w", errdefs.ErrNotImplemented)
	}
	switch {
	case isBind(m):
		return p.addBind(c, f, name, m)
	case m.Type == "cgroup" || m.Type == "cgroup2":
		// The guest has version 2 only, and its runtime knows how to mount it
		// for a container under the common name.
		m.Type, m.Source = "cgroup", "cgroup"
	case guestTypes[m.Type]:
	default:
		return p.addHost(c.ID, name, m)
	}
	p.Mounts = append(p.Mounts, m)
	return nil
}

// guestTypes are file systems without a source on the host: the guest mounts
// its own.
var guestTypes = map[string]bool{
	"proc": true, "sysfs": true, "tmpfs": true, "ramfs": true, "mqueue": true, "devpts": true,
	"devtmpfs": true, "hugetlbfs": true, "securityfs": true, "debugfs": true, "tracefs": true,
	"bpf": true, "configfs": true, "binfmt_misc": true, "pstore": true, "fusectl": true,
}

func (p *Plan) addBind(c Container, f Facts, name string, m specs.Mount) error {
	source := absolute(c.Bundle, m.Source)
	shm := path.Clean(m.Destination) == "/dev/shm" && (c.Shm == "" || source == c.Shm || kernelPath(source))
	if kernelPath(source) || shm {
		if shm {
			source = GuestShm
		} else {
			p.warn("%s at %s is the guest's, not the host's", source, m.Destination)
		}
		m.Type, m.Source = "bind", source
		p.Mounts = append(p.Mounts, m)
		return nil
	}
	mode, ok := f.Modes[source]
	if !ok {
		return fmt.Errorf("source %q: %w", source, errdefs.ErrNotFound)
	}
	if page, ok := f.HugePages[source]; ok {
		return p.addHugePages(c, source, page, m)
	}
	switch mode.Type() {
	case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
		return fmt.Errorf("source %q is a device of the host: %w", source, errdefs.ErrNotImplemented)
	case fs.ModeSocket, fs.ModeNamedPipe:
		p.warn("%s at %s is there, but reaches no process of the host", source, m.Destination)
	}
	b := &Bind{
		Source:            source,
		Recursive:         has(m.Options, "rbind"),
		ReadOnly:          last(m.Options, "ro", "rw") == "ro",
		RecursiveReadOnly: last(m.Options, "rro", "rrw") == "rro",
	}
	if b.RecursiveReadOnly && !f.Setattr {
		return fmt.Errorf("recursive read-only mounts need Linux 5.12: %w", errdefs.ErrNotImplemented)
	}
	switch propagation := last(m.Options, propagations...); propagation {
	case "shared", "rshared":
		return fmt.Errorf("mounts made in the guest cannot appear on the host (%s): %w", propagation, errdefs.ErrNotImplemented)
	case "slave", "rslave":
		b.Slave = true
	}
	if b.Recursive && b.ReadOnly && !b.RecursiveReadOnly && f.Submounts[source] {
		// What is mounted below may be written to. The guest finds those mounts when
		// they are walked to, and makes them as read-only as the one above: so that
		// is read-only on the host alone.
		m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
	}
	p.Host = append(p.Host, HostMount{Name: name, File: !mode.IsDir(), Bind: b})
	if mode.IsDir() && watched(source) {
		p.mountWatched(c.ID, name, m)
		return nil
	}
	p.mountShared(c.ID, name, m)
	return nil
}

// watched says that a directory is a volume that the kubelet changes while
// containers use it, and perhaps watch it: a share tells them of no change.
func watched(source string) bool {
	for _, kind := range []string{"configmap", "secret", "projected", "downward-api"} {
		if strings.Contains(source, "/kubernetes.io~"+kind+"/") {
			return true
		}
	}
	return false
}

// addHugePages has the guest make a volume of its own memory: what is mapped of
// the host's is out of its reach. All containers that have the volume have the
// same, to the end of the sandbox, in the size that the first one may use.
func (p *Plan) addHugePages(c Container, source string, page uint64, m specs.Mount) error {
	size := hugePagesLimit(c.HugePages, page)
	if size == 0 {
		return fmt.Errorf("source %q is of huge pages of %d KiB, of which the container may use none: set its limit of them: %w",
			source, page>>10, errdefs.ErrInvalidArgument)
	}
	name := sha256.Sum256([]byte(source))
	volume := path.Join(GuestHugePages, hex.EncodeToString(name[:8]))
	p.Storages = append(p.Storages, &protocol.Storage{
		Driver: "ephemeral", Source: "nodev", Fstype: "hugetlbfs", MountPoint: volume, Shared: true,
		Options: []string{fmt.Sprintf("pagesize=%d", page), fmt.Sprintf("size=%d", size)},
	})
	m.Type, m.Source = "bind", volume
	p.Mounts = append(p.Mounts, m)
	return nil
}

// hugePagesLimit is the limit in bytes of pages of one size; 0: none.
func hugePagesLimit(limits []specs.LinuxHugepageLimit, page uint64) uint64 {
	for _, l := range limits {
		if n, ok := pageSize(l.Pagesize); ok && n == page {
			return l.Limit
		}
	}
	return 0
}

// pageSize reads a size as control groups write it: 64KB, 2MB, 1GB.
func pageSize(s string) (uint64, bool) {
	for unit, shift := range map[string]int{"KB": 10, "MB": 20, "GB": 30} {
		if digits, ok := strings.CutSuffix(s, unit); ok {
			n, err := strconv.ParseUint(digits, 10, 32)
			return n << shift, err == nil
		}
	}
	return 0, false
}

// addHost plans a file system that only the host can reach: it is mounted
// there and shared.
func (p *Plan) addHost(id, name string, m specs.Mount) error {
	if m.Type == "" || m.Type == "none" {
		return fmt.Errorf("type %q: %w", m.Type, errdefs.ErrInvalidArgument)
	}
	host := Mount{Type: m.Type, Source: m.Source}
	var guest []string
	for _, o := range m.Options {
		switch {
		case slices.Contains(propagations, o):
		case generic[o]:
			host.Options, guest = append(host.Options, o), append(guest, o)
		default:
			host.Options = append(host.Options, o)
		}
	}
	guest = append(guest, "rbind")
	m.Options = guest
	p.Host = append(p.Host, HostMount{Name: name, Mounts: []Mount{host}})
	p.mountShared(id, name, m)
	return nil
}

// mountShared has the guest bind what the host put at name.
func (p *Plan) mountShared(id, name string, m specs.Mount) {
	m.Type, m.Source = "bind", path.Join(GuestDir, id, name)
	p.Mounts = append(p.Mounts, m)
}

// mountWatched has the guest bind a copy of that, which it keeps up to date.
func (p *Plan) mountWatched(id, name string, m specs.Mount) {
	copied := path.Join(GuestWatched, id, name)
	p.Storages = append(p.Storages, &protocol.Storage{
		Driver: "watchable-bind", Source: path.Join(GuestDir, id, name), Fstype: "bind", MountPoint: copied,
		Options: []string{"bind"},
	})
	m.Type, m.Source = "bind", copied
	p.Mounts = append(p.Mounts, m)
}

func (p *Plan) warn(format string, args ...any) {
	p.Warnings = append(p.Warnings, fmt.Sprintf(format, args...))
}

var propagations = []string{
	"private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable",
}

// generic are the options that every file system takes.
var generic = map[string]bool{
	"ro": true, "rw": true, "nosuid": true, "suid": true, "nodev": true, "dev": true, "noexec": true, "exec": true,
	"noatime": true, "atime": true, "nodiratime": true, "diratime": true, "relatime": true, "norelatime": true,
}

func isBind(m specs.Mount) bool { return m.Type == "bind" || has(m.Options, "bind", "rbind") }

// kernelPath says that a path is the kernel's, where the guest has its own.
func kernelPath(p string) bool {
	for _, top := range []string{"/proc", "/sys", "/dev"} {
		if p == top || strings.HasPrefix(p, top+"/") {
			return !strings.HasPrefix(p, "/dev/shm/")
		}
	}
	return false
}

// absolute reads a path as the specification does: relative to the bundle.
func absolute(bundle, p string) string {
	if filepath.IsAbs(p) {
		return filepath.Clean(p)
	}
	return filepath.Join(bundle, p)
}

func plainName(s string) bool {
	return s != "" && s != "." && s != ".." && !strings.ContainsAny(s, "/\x00")
}

func has(options []string, any ...string) bool { return last(options, any...) != "" }

// last is the last of the options that is one of those named: later ones win.
func last(options []string, of ...string) string {
	for _, o := range slices.Backward(options) {
		if slices.Contains(of, o) {
			return o
		}
	}
	return ""
}
