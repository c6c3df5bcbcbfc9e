package guest

import (
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func TestToSpec(t *testing.T) {
	got := toSpec(&protocol.Spec{
		Version: "1.0", Hostname: "h", Domainname: "d",
		Root: &protocol.Root{Path: "/r", Readonly: true},
		Process: &protocol.Process{
			Terminal: true, ConsoleSize: &protocol.Box{Height: 1, Width: 2},
			User: &protocol.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}, Umask: new(uint32(0o27))},
			Args: []string{"a"}, Env: []string{"b=c"}, Cwd: "/", NoNewPrivileges: true,
			ApparmorProfile: "docker-default", SelinuxLabel: "x:y:z",
			Rlimits: []*protocol.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: 2, Soft: 1}},
		},
		Mounts: []*protocol.Mount{{Destination: "/proc", Source: "proc", Type: "proc", Options: []string{"ro"}}},
		Hooks:  &protocol.Hooks{StartContainer: []*protocol.Hook{{Path: "/hook", Timeout: 4}}},
		Linux: &protocol.Linux{
			Sysctl:     map[string]string{"net.x": "1"},
			MountLabel: "label",
			Devices:    []*protocol.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: 0o666}, {Path: "/p", Type: "p"}},
			Seccomp: &protocol.LinuxSeccomp{
				DefaultAction: "SCMP_ACT_ERRNO", DefaultErrnoRet: new(uint32(38)), Architectures: []string{"SCMP_ARCH_X86_64"},
				Syscalls: []*protocol.LinuxSyscall{
					{Names: []string{"clone"}, Action: "SCMP_ACT_ALLOW", Args: []*protocol.LinuxSeccompArg{{Index: 1, Value: 2, ValueTwo: 3, Op: "SCMP_CMP_EQ"}}},
					{Names: []string{"x"}, Action: "SCMP_ACT_ERRNO", ErrnoRet: &protocol.LinuxSyscall_Errnoret{}},
				},
			},
			Resources: &protocol.LinuxResources{
				Memory: &protocol.LinuxMemory{Limit: 5},
				CPU:    &protocol.LinuxCPU{Shares: 6, Cpus: "0"},
				Pids:   &protocol.LinuxPids{},
			},
		},
	})
	want := &specs.Spec{
		Version: "1.0", Hostname: "h", Domainname: "d",
		Root: &specs.Root{Path: "/r", Readonly: true},
		Process: &specs.Process{
			Terminal: true, ConsoleSize: &specs.Box{Height: 1, Width: 2},
			User: specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}, Umask: new(uint32(0o27))},
			Args: []string{"a"}, Env: []string{"b=c"}, Cwd: "/", NoNewPrivileges: true, OOMScoreAdj: new(0),
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: 2, Soft: 1}},
		},
		Mounts: []specs.Mount{{Destination: "/proc", Source: "proc", Type: "proc", Options: []string{"ro"}}},
		Hooks:  &specs.Hooks{StartContainer: []specs.Hook{{Path: "/hook", Timeout: new(4)}}},
		Linux: &specs.Linux{
			Sysctl: map[string]string{"net.x": "1"},
			Devices: []specs.LinuxDevice{
				{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: new(os.FileMode(0o666)), UID: new(uint32(0)), GID: new(uint32(0))},
				{Path: "/p", Type: "p", UID: new(uint32(0)), GID: new(uint32(0))},
			},
			Seccomp: &specs.LinuxSeccomp{
				DefaultAction: "SCMP_ACT_ERRNO", DefaultErrnoRet: new(uint(38)), Architectures: []specs.Arch{"SCMP_ARCH_X86_64"},
				Syscalls: []specs.LinuxSyscall{
					{Names: []string{"clone"}, Action: "SCMP_ACT_ALLOW", Args: []specs.LinuxSeccompArg{{Index: 1, Value: 2, ValueTwo: 3, Op: "SCMP_CMP_EQ"}}},
					{Names: []string{"x"}, Action: "SCMP_ACT_ERRNO", ErrnoRet: new(uint(0))},
				},
			},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: new(int64(10)), Minor: new(int64(229)), Access: "rwm"}},
				Memory:  &specs.LinuxMemory{Limit: new(int64(5))},
				CPU:     &specs.LinuxCPU{Shares: new(uint64(6)), Cpus: "0"},
				Pids:    &specs.LinuxPids{},
			},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestToSpecOfNothing(t *testing.T) {
	got := toSpec(nil)
	if got.Linux == nil || got.Linux.Resources == nil || got.Root == nil || got.Process != nil {
		t.Errorf("got %+v", got)
	}
}

func TestCheckProcess(t *testing.T) {
	for name, p := range map[string]*specs.Process{
		"none":          nil,
		"no arguments":  {Cwd: "/"},
		"relative cwd":  {Args: []string{"x"}, Cwd: "tmp"},
		"no cwd":        {Args: []string{"x"}},
		"huge console":  {Args: []string{"x"}, Cwd: "/", ConsoleSize: &specs.Box{Height: 1 << 20}},
		"too much args": {Args: make([]string, maxStrings+1), Cwd: "/"},
	} {
		if err := checkProcess(p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
}

func TestNewProcess(t *testing.T) {
	p, err := newProcess(&specs.Process{
		User:    specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}},
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 5, Soft: 4}},
	})
	if err != nil || p.UID != 1 || p.GID != 2 || p.AdditionalGroups[0] != 3 || p.Rlimits[0].Type != unix.RLIMIT_NOFILE || p.Rlimits[0].Soft != 4 {
		t.Errorf("got %+v, %v", p, err)
	}
	if _, err := newProcess(&specs.Process{Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_X"}}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}
