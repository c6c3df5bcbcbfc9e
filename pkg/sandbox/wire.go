package sandbox

import (
	"math"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// The specification as it crosses the wire: the same, without pointers. Zero
// means unset there.

func wireSpec(in *specs.Spec) *protocol.Spec {
	return &protocol.Spec{
		Version:     in.Version,
		Process:     wireProcess(in.Process),
		Root:        &protocol.Root{Path: in.Root.Path, Readonly: in.Root.Readonly},
		Hostname:    in.Hostname,
		Domainname:  in.Domainname,
		Mounts:      convert(in.Mounts, wireMount),
		Annotations: in.Annotations,
		Linux:       wireLinux(in.Linux),
	}
}

func wireProcess(in *specs.Process) *protocol.Process {
	out := &protocol.Process{
		Terminal: in.Terminal,
		User: &protocol.User{
			UID: in.User.UID, GID: in.User.GID, AdditionalGids: in.User.AdditionalGids,
			Username: in.User.Username, Umask: in.User.Umask,
		},
		Args:            in.Args,
		Env:             in.Env,
		Cwd:             in.Cwd,
		NoNewPrivileges: in.NoNewPrivileges,
		OOMScoreAdj:     int64(value(in.OOMScoreAdj)),
		Rlimits: convert(in.Rlimits, func(r specs.POSIXRlimit) *protocol.POSIXRlimit {
			return &protocol.POSIXRlimit{Type: r.Type, Hard: r.Hard, Soft: r.Soft}
		}),
	}
	if b := in.ConsoleSize; b != nil {
		out.ConsoleSize = &protocol.Box{Height: uint32(min(b.Height, math.MaxUint16)), Width: uint32(min(b.Width, math.MaxUint16))}
	}
	if c := in.Capabilities; c != nil {
		out.Capabilities = &protocol.LinuxCapabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable,
			Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	return out
}

func wireMount(m specs.Mount) *protocol.Mount {
	return &protocol.Mount{Destination: m.Destination, Source: m.Source, Type: m.Type, Options: m.Options}
}

func wireLinux(in *specs.Linux) *protocol.Linux {
	return &protocol.Linux{
		UIDMappings: convert(in.UIDMappings, wireIDMapping),
		GIDMappings: convert(in.GIDMappings, wireIDMapping),
		Sysctl:      in.Sysctl,
		Resources:   wireResources(in.Resources),
		CgroupsPath: in.CgroupsPath,
		Namespaces: convert(in.Namespaces, func(ns specs.LinuxNamespace) *protocol.LinuxNamespace {
			return &protocol.LinuxNamespace{Type: string(ns.Type), Path: ns.Path}
		}),
		Devices:           convert(in.Devices, wireDevice),
		Seccomp:           wireSeccomp(in.Seccomp),
		RootfsPropagation: in.RootfsPropagation,
		MaskedPaths:       in.MaskedPaths,
		ReadonlyPaths:     in.ReadonlyPaths,
	}
}

func wireIDMapping(m specs.LinuxIDMapping) *protocol.LinuxIDMapping {
	return &protocol.LinuxIDMapping{HostID: m.HostID, ContainerID: m.ContainerID, Size: m.Size}
}

func wireDevice(d specs.LinuxDevice) *protocol.LinuxDevice {
	return &protocol.LinuxDevice{
		Path: d.Path, Type: d.Type, Major: d.Major, Minor: d.Minor,
		FileMode: uint32(value(d.FileMode) & (os.ModePerm | 0o7000)), UID: value(d.UID), GID: value(d.GID),
	}
}

func wireResources(in *specs.LinuxResources) *protocol.LinuxResources {
	if in == nil {
		return nil
	}
	out := &protocol.LinuxResources{
		Devices: convert(in.Devices, wireDeviceRule),
		HugepageLimits: convert(in.HugepageLimits, func(l specs.LinuxHugepageLimit) *protocol.LinuxHugepageLimit {
			return &protocol.LinuxHugepageLimit{Pagesize: l.Pagesize, Limit: l.Limit}
		}),
		Unified: in.Unified,
	}
	if m := in.Memory; m != nil {
		out.Memory = &protocol.LinuxMemory{
			Limit: value(m.Limit), Reservation: value(m.Reservation), Swap: value(m.Swap),
			Kernel: value(m.Kernel), KernelTCP: value(m.KernelTCP), //nolint:staticcheck // the protocol still has it
			Swappiness: value(m.Swappiness), DisableOOMKiller: value(m.DisableOOMKiller),
		}
	}
	if c := in.CPU; c != nil {
		out.CPU = &protocol.LinuxCPU{
			Shares: value(c.Shares), Quota: value(c.Quota), Period: value(c.Period),
			RealtimeRuntime: value(c.RealtimeRuntime), RealtimePeriod: value(c.RealtimePeriod),
			Cpus: c.Cpus, Mems: c.Mems,
		}
	}
	if p := in.Pids; p != nil {
		out.Pids = &protocol.LinuxPids{Limit: value(p.Limit)}
	}
	return out
}

func wireDeviceRule(d specs.LinuxDeviceCgroup) *protocol.LinuxDeviceCgroup {
	number := func(n *int64) int64 {
		if n == nil {
			return -1
		}
		return *n
	}
	kind := d.Type
	if kind == "" {
		kind = "a"
	}
	return &protocol.LinuxDeviceCgroup{
		Allow: d.Allow, Type: kind, Major: number(d.Major), Minor: number(d.Minor), Access: d.Access,
	}
}

func wireSeccomp(in *specs.LinuxSeccomp) *protocol.LinuxSeccomp {
	if in == nil {
		return nil
	}
	out := &protocol.LinuxSeccomp{
		DefaultAction: string(in.DefaultAction),
		Architectures: convert(in.Architectures, func(a specs.Arch) string { return string(a) }),
		Flags:         convert(in.Flags, func(f specs.LinuxSeccompFlag) string { return string(f) }),
		Syscalls:      convert(in.Syscalls, wireSyscall),
	}
	if in.DefaultErrnoRet != nil {
		out.DefaultErrnoRet = new(uint32(*in.DefaultErrnoRet))
	}
	return out
}

func wireSyscall(in specs.LinuxSyscall) *protocol.LinuxSyscall {
	out := &protocol.LinuxSyscall{
		Names:  in.Names,
		Action: string(in.Action),
		Args: convert(in.Args, func(a specs.LinuxSeccompArg) *protocol.LinuxSeccompArg {
			return &protocol.LinuxSeccompArg{
				Index: uint64(a.Index), Value: a.Value, ValueTwo: a.ValueTwo, Op: string(a.Op),
			}
		}),
	}
	if in.ErrnoRet != nil {
		out.ErrnoRet = &protocol.LinuxSyscall_Errnoret{Errnoret: uint32(*in.ErrnoRet)}
	}
	return out
}

// value is what a pointer points to, or zero.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// convert maps a slice; nil stays nil.
func convert[A, B any](in []A, f func(A) B) []B {
	if in == nil {
		return nil
	}
	out := make([]B, len(in))
	for i, v := range in {
		out[i] = f(v)
	}
	return out
}
