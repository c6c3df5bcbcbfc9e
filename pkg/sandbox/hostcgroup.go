package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	stats1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/cgroups/v3/cgroup2"
	stats2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// The control group of a sandbox on the host: this process moves into it, and
// what it starts is born there, so that everything that a machine costs is
// charged to the pod. The limits of containers apply in the guest.

// cgroupOverheadMiB is what a machine may cost beyond its memory: QEMU (whose
// translation cache alone has up to a gigabyte without KVM), its helpers, this
// process.
const cgroupOverheadMiB = 1536

// CgroupState is what is needed to remove a control group.
type CgroupState struct {
	Version int    `json:"version"` // 1 or 2
	Path    string `json:"path"`    // below the root of the hierarchy, or of each
}

// A hostCgroup is one that was made.
type hostCgroup struct {
	dir   *os.File // version 2: to clone into
	group member
	home  member // where this process was before
}

// member is what the two versions' groups have in common.
type member interface{ AddProc(pid uint64) error }

// v1 adapts the groups of version 1.
type v1 struct{ cgroup1.Cgroup }

func (g v1) AddProc(pid uint64) error { return g.Cgroup.AddProc(pid) }

// HostMetrics is what the whole sandbox costs on the host, in the form of the
// host's version of control groups (*stats.Metrics of containerd's cgroups);
// ErrNotFound without a group of its own.
func (s *Sandbox) HostMetrics() (proto.Message, error) {
	if s.cgroup == nil {
		return nil, fmt.Errorf("sandbox %q has no control group: %w", s.opts.ID, errdefs.ErrNotFound)
	}
	switch g := s.cgroup.group.(type) {
	case v1:
		return g.Stat(cgroup1.IgnoreNotExist)
	case *cgroup2.Manager:
		return g.Stat()
	}
	return nil, fmt.Errorf("control group of sandbox %q: %w", s.opts.ID, errdefs.ErrNotImplemented)
}

// hostOOM says whether the host's kernel killed something of the sandbox for lack
// of memory. A machine does not survive the loss of any process.
func (s *Sandbox) hostOOM() bool {
	m, err := s.HostMetrics()
	if err != nil {
		return false
	}
	switch m := m.(type) {
	case *stats1.Metrics:
		return m.GetMemoryOomControl().GetOomKill() > 0
	case *stats2.Metrics:
		return m.GetMemoryEvents().GetOomKill() > 0
	}
	return false
}

// cgroupPath reads linux.cgroupsPath: a path, or slice:prefix:name for
// systemd. An empty one is none.
func cgroupPath(s string) (string, error) {
	parts := strings.Split(s, ":")
	if s == "" || len(parts) != 3 {
		return strings.TrimSuffix(path.Clean("/"+s), "/"), nil
	}
	slice, prefix, name := parts[0], parts[1], parts[2]
	if slice == "" {
		slice = "system.slice"
	}
	dir, err := slicePath(slice)
	if err != nil {
		return "", fmt.Errorf("cgroup path %q: %w", s, err)
	}
	switch {
	case name == "" || strings.Contains(prefix+name, "/"):
		return "", fmt.Errorf("cgroup path %q: bad name: %w", s, errdefs.ErrInvalidArgument)
	case strings.HasSuffix(name, ".slice"):
		return path.Join(dir, name), nil
	case prefix == "":
		return path.Join(dir, name+".scope"), nil
	}
	return path.Join(dir, prefix+"-"+name+".scope"), nil
}

// slicePath says where systemd has a slice: a-b.slice is in a.slice.
func slicePath(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "" || strings.Contains(slice, "/") {
		return "", fmt.Errorf("%q is no slice: %w", slice, errdefs.ErrInvalidArgument)
	}
	if name == "-" {
		return "/", nil
	}
	dir, full := "/", ""
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("%q is no slice: %w", slice, errdefs.ErrInvalidArgument)
		}
		full += part
		dir = path.Join(dir, full+".slice")
		full += "-"
	}
	return dir, nil
}

// hostLimits are the limits of the group: nothing that could kill a machine
// for what its container was promised. Placement and weight are the
// container's own, for the host alone knows its CPUs.
func hostLimits(r *specs.LinuxResources, memoryMiB int) *specs.LinuxResources {
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}
	if r.CPU != nil {
		out.CPU.Shares, out.CPU.Cpus, out.CPU.Mems = r.CPU.Shares, r.CPU.Cpus, r.CPU.Mems
	}
	if r.Memory != nil && r.Memory.Limit != nil && mebibytes(*r.Memory.Limit) > 0 {
		out.Memory.Limit = new(int64(memoryMiB+cgroupOverheadMiB) << 20)
	}
	return out
}

// cgroupVersion is the host's; 0 when it has none.
func cgroupVersion() int {
	switch cgroups.Mode() {
	case cgroups.Unified:
		return 2
	case cgroups.Legacy, cgroups.Hybrid:
		return 1
	default:
		return 0
	}
}

// joinCgroup is a step of Start. A host where it can't be done still runs
// sandboxes: their cost is then charged to whoever runs this process.
func (s *Sandbox) joinCgroup(ctx context.Context, spec *specs.Spec, m *hypervisor.Spec, undo *cleanup.Stack) error {
	if spec.Linux == nil {
		return nil
	}
	p, err := cgroupPath(spec.Linux.CgroupsPath)
	if err != nil {
		return err
	}
	st := CgroupState{Version: cgroupVersion(), Path: p}
	if p == "" || st.Version == 0 {
		return nil
	}
	// Recorded before it is there, so that it is found after a crash.
	if err := s.state.update(func(state *State) { state.Cgroup = &st }); err != nil {
		return err
	}
	undo.Add(func() error {
		ctx, cancel := within(ctx, cleanupTimeout)
		defer cancel()
		return removeCgroup(ctx, &st)
	})
	limits := hostLimits(resourcesOf(spec), m.MemoryMiB)
	if s.opts.Pod {
		limits.Memory.Limit = nil // the machine grows; the pod's own group, above, has the limit
	}
	g, err := makeCgroup(st, limits)
	if err != nil {
		log.G(ctx).WithError(err).WithField("cgroup", p).Warn("machine's control group has no limits")
		g, err = makeCgroup(st, &specs.LinuxResources{})
	}
	if err == nil {
		undo.Add(g.leave)
		err = g.enter()
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("cgroup", p).Warn("machine is not accounted to its control group")
		return nil
	}
	s.cgroup = g
	return nil
}

// makeCgroup makes the group. It must be removed also after an error.
func makeCgroup(st CgroupState, r *specs.LinuxResources) (*hostCgroup, error) {
	if st.Version == 2 {
		return makeUnified(cgroupRoot, st.Path, r)
	}
	home, err := cgroup1.Load(cgroup1.PidPath(os.Getpid()), cgroup1.WithHierarchy(hierarchies))
	if err != nil {
		return nil, fmt.Errorf("own cgroup: %w", err)
	}
	group, err := cgroup1.New(cgroup1.StaticPath(st.Path), r, cgroup1.WithHierarchy(hierarchies))
	if err != nil {
		return nil, err
	}
	return &hostCgroup{home: v1{home}, group: v1{group}}, nil
}

// makeUnified is makeCgroup for version 2, mounted at root.
func makeUnified(root, name string, r *specs.LinuxResources) (*hostCgroup, error) {
	own, err := cgroup2.PidGroupPath(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("own cgroup: %w", err)
	}
	home, err := cgroup2.Load(own, cgroup2.WithMountpoint(root))
	if err != nil {
		return nil, fmt.Errorf("own cgroup %q: %w", own, err)
	}
	group, err := cgroup2.NewManager(root, name, cgroup2.ToResources(r))
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(filepath.Join(root, name))
	if err != nil {
		return nil, err
	}
	return &hostCgroup{home: home, group: group, dir: dir}, nil
}

// cgroupRoot is where cgroups are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// accounted are the controllers that a machine is charged to. The others have
// no say about a process of the host that is no container.
var accounted = []cgroup1.Name{cgroup1.Cpu, cgroup1.Cpuacct, cgroup1.Cpuset, cgroup1.Memory, cgroup1.Pids, cgroup1.Blkio}

// hierarchies are those of version 1 that count.
func hierarchies() ([]cgroup1.Subsystem, error) {
	all, err := cgroup1.Default()
	return slices.DeleteFunc(all, func(s cgroup1.Subsystem) bool { return !slices.Contains(accounted, s.Name()) }), err
}

// enter moves this process into the group.
func (g *hostCgroup) enter() error { return g.group.AddProc(uint64(os.Getpid())) }

// leave moves this process back, and what may still live in the group stays.
func (g *hostCgroup) leave() error {
	err := g.home.AddProc(uint64(os.Getpid()))
	if g.dir != nil {
		err = errors.Join(err, g.dir.Close())
	}
	return err
}

// fd is for starting processes in the group; 0: they are born in it anyway.
func (g *hostCgroup) fd() int {
	if g == nil || g.dir == nil {
		return 0
	}
	return int(g.dir.Fd())
}

// removeCgroup removes a group that has no processes any more. One that is not
// there is success.
func removeCgroup(ctx context.Context, st *CgroupState) error {
	if st == nil || path.Clean("/"+st.Path) == "/" {
		return nil
	}
	var errs []error
	for _, dir := range cgroupDirs(*st) {
		if err := removeDir(ctx, dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// removeDir removes a directory of a control group. One whose last process has
// just ended may stay busy for a moment, of whose end nobody is told.
func removeDir(ctx context.Context, dir string) error {
	for delay := time.Millisecond; ; delay *= 2 {
		err := unix.Rmdir(dir)
		if !errors.Is(err, unix.EBUSY) || delay > 500*time.Millisecond {
			return os.NewSyscallError("rmdir", err)
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return os.NewSyscallError("rmdir", err)
		}
	}
}

func cgroupDirs(st CgroupState) []string {
	p := path.Clean("/" + st.Path)
	if st.Version != 1 {
		return []string{filepath.Join(cgroupRoot, p)}
	}
	var dirs []string
	for _, name := range accounted {
		dirs = append(dirs, filepath.Join(cgroupRoot, string(name), p))
	}
	return dirs
}
