package sandbox

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/storage"
)

// A guestSpec is the host's specification on its way to the guest's: a copy
// that each transform below changes. What a machine can't give at all is
// refused by checkSpec before anything is touched; what it leaves out, because
// it names things of the host, is noted for one warning.
type guestSpec struct {
	specs.Spec
	notes []string
	// shared says that the container joins the sandbox's pid namespace, pidOf
	// whose it joins instead.
	shared bool
	pidOf  string
}

// newGuestSpec turns a host's specification into what the guest gets.
func newGuestSpec(host *specs.Spec, id string, terminal bool, plan *storage.Plan, tasks map[int]*Container) (*guestSpec, error) {
	g := &guestSpec{}
	b, err := json.Marshal(host)
	if err == nil {
		err = json.Unmarshal(b, &g.Spec)
	}
	if err != nil {
		return nil, fmt.Errorf("copy specification: %w", err)
	}
	if g.Linux == nil {
		g.Linux = &specs.Linux{}
	}
	g.Process.Terminal = g.Process.Terminal || terminal
	g.Hooks = nil // the host's business; checkSpec refused the others
	g.setNamespaces(tasks)
	g.dropLabels()
	g.dropDevices()
	g.dropUnknown()
	g.setFiles(plan)
	g.Linux.CgroupsPath = "/vmshim/" + id
	if g.Linux.Resources != nil {
		var notes []string
		g.Linux.Resources, notes = guestResources(g.Linux.Resources)
		g.notes = append(g.notes, notes...)
	}
	return g, nil
}

func (g *guestSpec) note(what string) { g.notes = append(g.notes, what) }

// addSysctls adds the pod's: they belong to namespaces that its containers share.
func (g *guestSpec) addSysctls(pod map[string]string) {
	if len(pod) == 0 {
		return
	}
	all := maps.Clone(pod)
	maps.Copy(all, g.Linux.Sysctl)
	g.Linux.Sysctl = all
}

// checkSpec refuses what a machine can't give. tasks are the containers of the
// sandbox by their task pids: those's namespaces stand for its own.
func checkSpec(spec *specs.Spec, pod bool, tasks map[int]*Container) error {
	if spec == nil || spec.Process == nil || len(spec.Process.Args) == 0 {
		return fmt.Errorf("specification without a command: %w", errdefs.ErrInvalidArgument)
	}
	linux := spec.Linux
	if linux == nil {
		linux = &specs.Linux{}
	}
	if !hasNamespace(linux.Namespaces, specs.NetworkNamespace) {
		return errHostNetwork
	}
	if hasNamespace(linux.Namespaces, specs.UserNamespace) {
		return fmt.Errorf("a user namespace in a machine: its other namespaces would have to be made in it: %w", errdefs.ErrNotImplemented)
	}
	for _, kind := range []specs.LinuxNamespaceType{specs.PIDNamespace, specs.IPCNamespace} {
		if pod {
			break // the pod's stand in
		}
		if !hasNamespace(linux.Namespaces, kind) {
			return fmt.Errorf("the host's %s namespace is out of a machine's reach: %w", kind, errdefs.ErrInvalidArgument)
		}
	}
	for _, ns := range linux.Namespaces {
		if pid, ok := taskNamespace(ns); ok && tasks[pid] == nil {
			return fmt.Errorf("%s namespace %q is not in this machine: %w", ns.Type, ns.Path, errdefs.ErrInvalidArgument)
		}
	}
	if h := spec.Hooks; h != nil && len(h.CreateContainer)+len(h.StartContainer) > 0 {
		return fmt.Errorf("createContainer and startContainer hooks belong into the guest, which has no files of the host: %w", errdefs.ErrNotImplemented)
	}
	if linux.Seccomp != nil && linux.Seccomp.ListenerPath != "" {
		return fmt.Errorf("seccomp notifications cannot leave the guest: %w", errdefs.ErrNotImplemented)
	}
	if len(linux.NetDevices) > 0 {
		return fmt.Errorf("network devices cannot be moved into a machine: %w", errdefs.ErrNotImplemented)
	}
	return nil
}

func hasNamespace(all []specs.LinuxNamespace, kind specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(all, func(ns specs.LinuxNamespace) bool { return ns.Type == kind })
}

// taskNamespace says whose pid, ipc or uts namespace is to be joined. The
// network namespace is the host's, and so is joined there.
func taskNamespace(ns specs.LinuxNamespace) (pid int, ok bool) {
	switch ns.Type {
	case specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace:
		rest, _ := strings.CutPrefix(path.Clean(ns.Path), "/proc/")
		pid, _ = strconv.Atoi(strings.SplitN(rest, "/", 2)[0])
		return pid, ns.Path != ""
	}
	return 0, false
}

// setNamespaces keeps those that a container has of its own in the guest. The
// guest has the sandbox's net, ipc and uts namespaces, and its pid namespace
// where that is shared; paths are the host's.
func (g *guestSpec) setNamespaces(tasks map[int]*Container) {
	kept := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	g.shared = !hasNamespace(g.Linux.Namespaces, specs.PIDNamespace)
	for _, ns := range g.Linux.Namespaces {
		switch ns.Type {
		case specs.IPCNamespace, specs.UTSNamespace:
			kept = append(kept, specs.LinuxNamespace{Type: ns.Type})
		case specs.PIDNamespace:
			if pid, ok := taskNamespace(ns); ok {
				if c := tasks[pid]; c != nil && c.pause == nil {
					g.pidOf = c.id
				} else {
					g.shared = true
				}
				continue
			}
			kept = append(kept, specs.LinuxNamespace{Type: ns.Type})
		case specs.TimeNamespace:
			g.note("time namespace")
		}
	}
	g.Linux.Namespaces = kept
	g.Linux.TimeOffsets = nil
}

// dropLabels drops what names policies of the host's kernel: every
// specification made on Debian has the one, on Fedora the other.
func (g *guestSpec) dropLabels() {
	if dropProcessLabels(g.Process) || g.Linux.MountLabel != "" {
		g.note("AppArmor and SELinux labels")
	}
	g.Linux.MountLabel = ""
}

func dropProcessLabels(p *specs.Process) (dropped bool) {
	dropped = p.ApparmorProfile != "" || p.SelinuxLabel != ""
	p.ApparmorProfile, p.SelinuxLabel = "", ""
	return dropped
}

// dropUnknown drops settings that the agent protocol has no fields for, or
// that mean hardware of the host.
func (g *guestSpec) dropUnknown() {
	for what, asked := range map[string]bool{
		"RDT":           g.Linux.IntelRdt != nil,
		"memory policy": g.Linux.MemoryPolicy != nil,
		"personality":   g.Linux.Personality != nil,
		"scheduler":     g.Process.Scheduler != nil,
		"I/O priority":  g.Process.IOPriority != nil,
		"CPU affinity":  g.Process.ExecCPUAffinity != nil,
	} {
		if asked {
			g.note(what)
		}
	}
	g.Linux.IntelRdt, g.Linux.MemoryPolicy, g.Linux.Personality = nil, nil, nil
	g.Process.Scheduler, g.Process.IOPriority, g.Process.ExecCPUAffinity = nil, nil, nil
	slices.Sort(g.notes)
}

// dropDevices keeps the device nodes that every Linux has under the same
// numbers. The rest is hardware of the host, or happens to be something else
// in the guest.
func (g *guestSpec) dropDevices() {
	var dropped []string
	g.Linux.Devices = slices.DeleteFunc(g.Linux.Devices, func(d specs.LinuxDevice) bool {
		drop := d.Type != "p" && !universal(d.Type, &d.Major, &d.Minor)
		if drop {
			dropped = append(dropped, d.Path)
		}
		return drop
	})
	if n := len(dropped); n > 3 {
		dropped = append(dropped[:3], fmt.Sprintf("%d more", n-3))
	}
	if len(dropped) > 0 {
		g.note("devices " + strings.Join(dropped, ", "))
	}
}

// universal says that numbers mean the same on every Linux; nil is any.
func universal(kind string, major, minor *int64) bool {
	if major == nil || *major < 0 {
		return true
	}
	if kind != "c" && kind != "u" {
		return false
	}
	minors, ok := map[int64][]int64{
		1:   {3, 5, 7, 8, 9}, // null, zero, full, random, urandom
		5:   {0, 1, 2},       // tty, console, ptmx
		10:  {200, 229},      // tun, fuse
		136: nil,             // pseudo-terminals
	}[*major]
	return ok && (minor == nil || *minor < 0 || minors == nil || slices.Contains(minors, *minor))
}

// setFiles points at what the guest finds below the share.
func (g *guestSpec) setFiles(plan *storage.Plan) {
	if g.Root == nil {
		g.Root = &specs.Root{}
	}
	g.Root.Path = plan.Root
	g.Mounts = plan.Mounts
	g.notes = append(g.notes, plan.Warnings...)
}

// guestResources keeps what a control group in the guest can apply. CPU and
// memory placement are the host's, which applies them to the machine; limits
// on block devices and network classes name things of the host.
func guestResources(in *specs.LinuxResources) (out *specs.LinuxResources, notes []string) {
	out = &specs.LinuxResources{Memory: in.Memory, Pids: in.Pids}
	if in.CPU != nil {
		cpu := *in.CPU
		if cpu.Burst != nil || cpu.Idle != nil {
			notes = append(notes, "CPU burst and idle")
		}
		cpu.Cpus, cpu.Mems, cpu.Burst, cpu.Idle = "", "", nil, nil
		out.CPU = &cpu
	}
	for _, rule := range in.Devices {
		if universal(rule.Type, rule.Major, rule.Minor) {
			out.Devices = append(out.Devices, rule)
		}
	}
	// The guest has no pages to hand out, and perhaps not the sizes.
	for _, l := range in.HugepageLimits {
		if l.Limit > 0 {
			out.HugepageLimits = append(out.HugepageLimits, l)
		}
	}
	out.Unified = maps.Clone(in.Unified)
	maps.DeleteFunc(out.Unified, func(file, _ string) bool {
		drop := strings.HasPrefix(file, "io.") || strings.HasPrefix(file, "cpuset.") || strings.HasPrefix(file, "rdma.")
		if drop {
			notes = append(notes, file)
		}
		return drop
	})
	if limitsIO(in.BlockIO) {
		notes = append(notes, "block I/O limits")
	}
	if len(in.Rdma) > 0 {
		notes = append(notes, "RDMA limits")
	}
	slices.Sort(notes)
	return out, notes
}

func limitsIO(b *specs.LinuxBlockIO) bool {
	return b != nil && (b.Weight != nil && *b.Weight != 0 || len(b.WeightDevice)+len(b.ThrottleReadBpsDevice)+
		len(b.ThrottleWriteBpsDevice)+len(b.ThrottleReadIOPSDevice)+len(b.ThrottleWriteIOPSDevice) > 0)
}
