package guest

import (
	"maps"
	"os"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// Conversion of the protocol's copy of the OCI specification to the real one.
// The protocol's messages know no absence: zero means unset. Dropped on the way
// are AppArmor, SELinux and RDT settings, which name things of the host.

func toSpec(in *protocol.Spec) *specs.Spec {
	return &specs.Spec{
		Version:    in.GetVersion(),
		Process:    toProcess(in.GetProcess()),
		Root:       &specs.Root{Path: in.GetRoot().GetPath(), Readonly: in.GetRoot().GetReadonly()},
		Hostname:   in.GetHostname(),
		Domainname: in.GetDomainname(),
		Mounts:     convert(in.GetMounts(), toMount),
		Hooks:      toHooks(in.GetHooks()),
		Linux:      toLinux(in.GetLinux()),
	}
}

func toProcess(in *protocol.Process) *specs.Process {
	if in == nil {
		return nil
	}
	score := int(in.GetOOMScoreAdj())
	out := &specs.Process{
		Terminal: in.GetTerminal(),
		User: specs.User{
			UID:            in.GetUser().GetUID(),
			GID:            in.GetUser().GetGID(),
			AdditionalGids: in.GetUser().GetAdditionalGids(),
		},
		Args:            in.GetArgs(),
		Env:             in.GetEnv(),
		Cwd:             in.GetCwd(),
		NoNewPrivileges: in.GetNoNewPrivileges(),
		// Never unset: the agent's own, which protects it, would be inherited.
		OOMScoreAdj: &score,
	}
	if u := in.GetUser(); u != nil {
		out.User.Umask = u.Umask
	}
	if b := in.GetConsoleSize(); b != nil {
		out.ConsoleSize = &specs.Box{Height: uint(b.GetHeight()), Width: uint(b.GetWidth())}
	}
	if c := in.GetCapabilities(); c != nil {
		out.Capabilities = &specs.LinuxCapabilities{
			Bounding: c.GetBounding(), Effective: c.GetEffective(), Inheritable: c.GetInheritable(),
			Permitted: c.GetPermitted(), Ambient: c.GetAmbient(),
		}
	}
	out.Rlimits = convert(in.GetRlimits(), func(r *protocol.POSIXRlimit) specs.POSIXRlimit {
		return specs.POSIXRlimit{Type: r.GetType(), Hard: r.GetHard(), Soft: r.GetSoft()}
	})
	return out
}

func toMount(m *protocol.Mount) specs.Mount {
	return specs.Mount{Destination: m.GetDestination(), Source: m.GetSource(), Type: m.GetType(), Options: m.GetOptions()}
}

func toHooks(in *protocol.Hooks) *specs.Hooks {
	if in == nil {
		return nil
	}
	hook := func(h *protocol.Hook) specs.Hook {
		out := specs.Hook{Path: h.GetPath(), Args: h.GetArgs(), Env: h.GetEnv()}
		if t := int(h.GetTimeout()); t > 0 {
			out.Timeout = &t
		}
		return out
	}
	return &specs.Hooks{
		Prestart:        convert(in.GetPrestart(), hook), //nolint:staticcheck // the protocol still has them
		CreateRuntime:   convert(in.GetCreateRuntime(), hook),
		CreateContainer: convert(in.GetCreateContainer(), hook),
		StartContainer:  convert(in.GetStartContainer(), hook),
		Poststart:       convert(in.GetPoststart(), hook),
		Poststop:        convert(in.GetPoststop(), hook),
	}
}

func toLinux(in *protocol.Linux) *specs.Linux {
	out := &specs.Linux{
		UIDMappings:       convert(in.GetUIDMappings(), toIDMapping),
		GIDMappings:       convert(in.GetGIDMappings(), toIDMapping),
		Sysctl:            maps.Clone(in.GetSysctl()),
		Resources:         toResources(in.GetResources()),
		Seccomp:           toSeccomp(in.GetSeccomp()),
		RootfsPropagation: in.GetRootfsPropagation(),
		MaskedPaths:       in.GetMaskedPaths(),
		ReadonlyPaths:     in.GetReadonlyPaths(),
		Devices:           convert(in.GetDevices(), toDevice),
		Namespaces: convert(in.GetNamespaces(), func(n *protocol.LinuxNamespace) specs.LinuxNamespace {
			return specs.LinuxNamespace{Type: specs.LinuxNamespaceType(n.GetType()), Path: n.GetPath()}
		}),
	}
	out.Resources.Devices = allowDevices(out.Resources.Devices, out.Devices)
	return out
}

func toIDMapping(m *protocol.LinuxIDMapping) specs.LinuxIDMapping {
	return specs.LinuxIDMapping{ContainerID: m.GetContainerID(), HostID: m.GetHostID(), Size: m.GetSize()}
}

func toDevice(d *protocol.LinuxDevice) specs.LinuxDevice {
	uid, gid := d.GetUID(), d.GetGID()
	out := specs.LinuxDevice{
		Path: d.GetPath(), Type: d.GetType(), Major: d.GetMajor(), Minor: d.GetMinor(),
		UID: &uid, GID: &gid,
	}
	if m := os.FileMode(d.GetFileMode()); m != 0 {
		out.FileMode = &m
	}
	return out
}

// allowDevices lets the container use the device nodes that it is given: hosts
// of this protocol drop the rules of the control group, which name devices of
// theirs.
func allowDevices(rules []specs.LinuxDeviceCgroup, nodes []specs.LinuxDevice) []specs.LinuxDeviceCgroup {
	if len(rules) > 0 {
		return rules
	}
	for _, d := range nodes {
		if d.Type == "b" || d.Type == "c" || d.Type == "u" {
			kind := d.Type
			if kind == "u" {
				kind = "c"
			}
			rules = append(rules, specs.LinuxDeviceCgroup{
				Allow: true, Type: kind, Major: new(d.Major), Minor: new(d.Minor), Access: "rwm",
			})
		}
	}
	return rules
}

func toSeccomp(in *protocol.LinuxSeccomp) *specs.LinuxSeccomp {
	if in == nil {
		return nil
	}
	out := &specs.LinuxSeccomp{
		DefaultAction: specs.LinuxSeccompAction(in.GetDefaultAction()),
		Architectures: convert(in.GetArchitectures(), func(s string) specs.Arch { return specs.Arch(s) }),
		Flags:         convert(in.GetFlags(), func(s string) specs.LinuxSeccompFlag { return specs.LinuxSeccompFlag(s) }),
		Syscalls:      convert(in.GetSyscalls(), toSyscall),
	}
	if in.DefaultErrnoRet != nil {
		out.DefaultErrnoRet = new(uint(*in.DefaultErrnoRet))
	}
	return out
}

func toSyscall(in *protocol.LinuxSyscall) specs.LinuxSyscall {
	out := specs.LinuxSyscall{
		Names:  slices.Clone(in.GetNames()),
		Action: specs.LinuxSeccompAction(in.GetAction()),
		Args: convert(in.GetArgs(), func(a *protocol.LinuxSeccompArg) specs.LinuxSeccompArg {
			return specs.LinuxSeccompArg{
				Index: uint(a.GetIndex()), Value: a.GetValue(), ValueTwo: a.GetValueTwo(),
				Op: specs.LinuxSeccompOperator(a.GetOp()),
			}
		}),
	}
	if e, ok := in.GetErrnoRet().(*protocol.LinuxSyscall_Errnoret); ok {
		out.ErrnoRet = new(uint(e.Errnoret))
	}
	return out
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
