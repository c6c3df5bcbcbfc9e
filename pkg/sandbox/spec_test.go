package sandbox

import (
	"encoding/json"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/storage"
)

var testPlan = &storage.Plan{
	Root:     "/guest/rootfs",
	Mounts:   []specs.Mount{{Destination: "/data", Type: "bind", Source: "/guest/0", Options: []string{"rbind"}}},
	Warnings: []string{"a warning"},
}

// transform runs the transforms on the usual specification, changed.
func transform(t *testing.T, change func(*specs.Spec)) *guestSpec {
	t.Helper()
	host := testSpec()
	change(host)
	before, err := json.Marshal(host)
	if err != nil {
		t.Fatal(err)
	}
	g, err := newGuestSpec(host, "c1", false, testPlan, nil)
	if err != nil {
		t.Fatal(err)
	}
	if after, err := json.Marshal(host); err != nil || string(after) != string(before) {
		t.Errorf("the host's specification was changed: %s\n%s", before, after)
	}
	return g
}

func TestGuestSpecFiles(t *testing.T) {
	g := transform(t, func(s *specs.Spec) { s.Root.Readonly = true })
	if g.Root.Path != testPlan.Root || !g.Root.Readonly || g.Linux.CgroupsPath != "/vmshim/c1" {
		t.Errorf("root %+v, cgroup %q", g.Root, g.Linux.CgroupsPath)
	}
	if diff := cmp.Diff(testPlan.Mounts, g.Mounts); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"a warning"}, g.notes); diff != "" {
		t.Error(diff)
	}
	g = transform(t, func(s *specs.Spec) { s.Root, s.Linux = nil, nil })
	if g.Root.Path != testPlan.Root {
		t.Errorf("root %+v", g.Root)
	}
}

func TestGuestSpecNamespaces(t *testing.T) {
	all := []specs.LinuxNamespace{
		{Type: specs.PIDNamespace},
		{Type: specs.IPCNamespace, Path: "/proc/7/ns/ipc"},
		{Type: specs.UTSNamespace, Path: "/proc/7/ns/uts"},
		{Type: specs.NetworkNamespace, Path: "/run/netns/x"},
		{Type: specs.MountNamespace},
		{Type: specs.CgroupNamespace},
	}
	want := []specs.LinuxNamespace{
		{Type: specs.MountNamespace},
		{Type: specs.PIDNamespace},
		{Type: specs.IPCNamespace},
		{Type: specs.UTSNamespace},
	}
	g := transform(t, func(s *specs.Spec) { s.Linux.Namespaces = all })
	if diff := cmp.Diff(want, g.Linux.Namespaces); diff != "" || g.shared {
		t.Error(diff, g.shared)
	}
	g = transform(t, func(s *specs.Spec) {
		s.Linux.Namespaces = slices.Concat(all[1:], []specs.LinuxNamespace{
			{Type: specs.PIDNamespace, Path: "/proc/7/ns/pid"}, {Type: specs.TimeNamespace},
		})
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 1}}
	})
	want = append(want[:1], want[2:]...)
	if diff := cmp.Diff(want, g.Linux.Namespaces); diff != "" || !g.shared || g.Linux.TimeOffsets != nil {
		t.Error(diff, g.shared)
	}
	if diff := cmp.Diff([]string{"time namespace", "a warning"}, g.notes); diff != "" {
		t.Error(diff)
	}
}

// TestGuestSpecLabels is the specification that every engine on Debian makes,
// and the one on Fedora.
func TestGuestSpecLabels(t *testing.T) {
	g := transform(t, func(s *specs.Spec) {
		s.Process.ApparmorProfile = "cri-containerd.apparmor.d"
		s.Process.SelinuxLabel = "system_u:system_r:container_t:s0:c1,c2"
		s.Linux.MountLabel = "system_u:object_r:container_file_t:s0:c1,c2"
	})
	if g.Process.ApparmorProfile != "" || g.Process.SelinuxLabel != "" || g.Linux.MountLabel != "" {
		t.Errorf("labels are left: %+v", g.Process)
	}
	if n := strings.Count(strings.Join(g.notes, "\n"), "labels"); n != 1 {
		t.Errorf("%d warnings: %q", n, g.notes)
	}
}

func TestGuestSpecHooks(t *testing.T) {
	g := transform(t, func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/x"}}} })
	if g.Hooks != nil {
		t.Errorf("hooks are left: %+v", g.Hooks)
	}
}

func TestGuestSpecTerminal(t *testing.T) {
	for _, own := range []bool{false, true} {
		host := testSpec()
		host.Process.Terminal = !own
		if g, err := newGuestSpec(host, "c1", own, testPlan, nil); err != nil || !g.Process.Terminal {
			t.Errorf("no terminal: %v", err)
		}
	}
}

func TestGuestSpecDevices(t *testing.T) {
	device := func(path, kind string, major, minor int64) specs.LinuxDevice {
		return specs.LinuxDevice{Path: path, Type: kind, Major: major, Minor: minor}
	}
	kept := []specs.LinuxDevice{
		device("/dev/null", "c", 1, 3), device("/dev/fuse", "c", 10, 229), device("/dev/pts/1", "c", 136, 1), device("/pipe", "p", 0, 0),
	}
	g := transform(t, func(s *specs.Spec) {
		s.Linux.Devices = slices.Concat(kept, []specs.LinuxDevice{
			device("/dev/sda", "b", 8, 0), device("/dev/mem", "c", 1, 1),
			device("/dev/kvm", "c", 10, 232), device("/dev/b1", "b", 1, 3), device("/dev/x", "u", 240, 3),
		})
	})
	if diff := cmp.Diff(kept, g.Linux.Devices); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"devices /dev/sda, /dev/mem, /dev/kvm, 2 more", "a warning"}, g.notes); diff != "" {
		t.Error(diff)
	}
}

func TestGuestSpecUnknown(t *testing.T) {
	g := transform(t, func(s *specs.Spec) {
		s.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"}
		s.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux}
		s.Process.Scheduler = &specs.Scheduler{}
		s.Process.IOPriority = &specs.LinuxIOPriority{}
	})
	if diff := cmp.Diff([]string{"I/O priority", "RDT", "personality", "scheduler", "a warning"}, g.notes); diff != "" {
		t.Error(diff)
	}
}

func TestGuestResources(t *testing.T) {
	in := &specs.LinuxResources{
		Devices: []specs.LinuxDeviceCgroup{
			{Allow: false, Access: "rwm"},
			{Allow: true, Type: "c", Major: new(int64(1)), Minor: new(int64(3)), Access: "rwm"},
			{Allow: true, Type: "c", Major: new(int64(136)), Access: "rwm"},
			{Allow: true, Type: "b", Major: new(int64(8)), Minor: new(int64(0)), Access: "r"},
			{Allow: true, Type: "b", Access: "m"},
		},
		Memory:         &specs.LinuxMemory{Limit: new(int64(1 << 20))},
		CPU:            &specs.LinuxCPU{Shares: new(uint64(512)), Cpus: "0-3", Mems: "0", Idle: new(int64(1))},
		Pids:           &specs.LinuxPids{Limit: new(int64(10))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB"}, {Pagesize: "2MB", Limit: 5}},
		Unified:        map[string]string{"memory.high": "1", "cpuset.cpus": "0", "io.max": "8:0 rbps=1"},
		BlockIO:        &specs.LinuxBlockIO{Weight: new(uint16(10))},
		Network:        &specs.LinuxNetwork{ClassID: new(uint32(1))},
		Rdma:           map[string]specs.LinuxRdma{"mlx": {}},
	}
	before, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	out, notes := guestResources(in)
	want := &specs.LinuxResources{
		Devices:        append(in.Devices[:3:3], in.Devices[4]),
		Memory:         in.Memory,
		CPU:            &specs.LinuxCPU{Shares: new(uint64(512))},
		Pids:           in.Pids,
		HugepageLimits: in.HugepageLimits[1:],
		Unified:        map[string]string{"memory.high": "1"},
	}
	if diff := cmp.Diff(want, out); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"CPU burst and idle", "RDMA limits", "block I/O limits", "cpuset.cpus", "io.max"}, notes); diff != "" {
		t.Error(diff)
	}
	if after, err := json.Marshal(in); err != nil || string(after) != string(before) {
		t.Errorf("changed: %s", after)
	}
	// What engines set without being asked is no reason for a warning.
	_, notes = guestResources(&specs.LinuxResources{
		BlockIO: &specs.LinuxBlockIO{Weight: new(uint16(0))}, Network: &specs.LinuxNetwork{}, CPU: &specs.LinuxCPU{Cpus: "0"},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "1GB"}},
	})
	if len(notes) > 0 {
		t.Errorf("notes %q", notes)
	}
}

func TestCheckSpec(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*specs.Spec)
		want   error
	}{
		{"usual", func(*specs.Spec) {}, nil},
		{"no process", func(s *specs.Spec) { s.Process = nil }, errdefs.ErrInvalidArgument},
		{"no command", func(s *specs.Spec) { s.Process.Args = nil }, errdefs.ErrInvalidArgument},
		{"no namespaces", func(s *specs.Spec) { s.Linux = nil }, errdefs.ErrInvalidArgument},
		{"host pid", func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] }, errdefs.ErrInvalidArgument},
		{"host network", func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[:4] }, errdefs.ErrInvalidArgument},
		{"pid of the pod", func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/7/ns/pid" }, nil},
		{"pid of another", func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/8/ns/pid" }, errdefs.ErrInvalidArgument},
		{"ipc somewhere", func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/run/ipcns/x" }, errdefs.ErrInvalidArgument},
		{"network by path", func(s *specs.Spec) { s.Linux.Namespaces[4].Path = "/run/netns/x" }, nil},
		{"user", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, errdefs.ErrNotImplemented},
		{"hooks of the host", func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: make([]specs.Hook, 1), Poststop: make([]specs.Hook, 1)}
		}, nil},
		{"createContainer", func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateContainer: make([]specs.Hook, 1)} }, errdefs.ErrNotImplemented},
		{"startContainer", func(s *specs.Spec) { s.Hooks = &specs.Hooks{StartContainer: make([]specs.Hook, 1)} }, errdefs.ErrNotImplemented},
		{"seccomp listener", func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/x"} }, errdefs.ErrNotImplemented},
		{"network device", func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} }, errdefs.ErrNotImplemented},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := testSpec()
			tt.change(spec)
			if err := checkSpec(spec, false, map[int]*Container{7: {id: "other"}}); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
	if err := checkSpec(nil, false, nil); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("error %v", err)
	}
}

func TestWireSpec(t *testing.T) {
	mode := fs.FileMode(0o1666)
	in := &specs.Spec{
		Version: "1.2.0", Hostname: "h", Domainname: "d", Annotations: map[string]string{"a": "b"},
		Root: &specs.Root{Path: "/r", Readonly: true},
		Process: &specs.Process{
			Terminal: true, ConsoleSize: &specs.Box{Height: 24, Width: 1 << 20},
			User: specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}, Umask: new(uint32(0o22))},
			Args: []string{"a"}, Env: []string{"E=1"}, Cwd: "/c",
			Capabilities: &specs.LinuxCapabilities{Bounding: []string{"B"}, Effective: []string{"E"}, Inheritable: []string{"I"}, Permitted: []string{"P"}, Ambient: []string{"A"}},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 2, Soft: 1}}, NoNewPrivileges: true, OOMScoreAdj: new(-5),
		},
		Mounts: []specs.Mount{{Destination: "/d", Source: "s", Type: "t", Options: []string{"o"}}},
		Linux: &specs.Linux{
			UIDMappings: []specs.LinuxIDMapping{{ContainerID: 1, HostID: 2, Size: 3}},
			GIDMappings: []specs.LinuxIDMapping{{ContainerID: 4, HostID: 5, Size: 6}},
			Sysctl:      map[string]string{"net.x": "1"},
			CgroupsPath: "/cg", Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}},
			Devices: []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3, FileMode: &mode, UID: new(uint32(1)), GID: new(uint32(2))}},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "c", Major: new(int64(0)), Minor: new(int64(3)), Access: "r"}},
				Memory: &specs.LinuxMemory{
					Limit: new(int64(1)), Reservation: new(int64(2)), Swap: new(int64(-1)), Kernel: new(int64(4)), //nolint:staticcheck // the protocol still has it
					KernelTCP: new(int64(5)), Swappiness: new(uint64(6)), DisableOOMKiller: new(true),
				},
				CPU: &specs.LinuxCPU{
					Shares: new(uint64(1)), Quota: new(int64(2)), Period: new(uint64(3)),
					RealtimeRuntime: new(int64(4)), RealtimePeriod: new(uint64(5)), Cpus: "c", Mems: "m",
				},
				Pids:           &specs.LinuxPids{Limit: new(int64(-1))},
				HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 7}},
				Unified:        map[string]string{"u": "v"},
			},
			Seccomp: &specs.LinuxSeccomp{
				DefaultAction: specs.ActErrno, DefaultErrnoRet: new(uint(38)), Architectures: []specs.Arch{specs.ArchX86_64},
				Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog},
				Syscalls: []specs.LinuxSyscall{
					{Names: []string{"a"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 1, Value: 2, ValueTwo: 3, Op: specs.OpEqualTo}}},
					{Names: []string{"b"}, Action: specs.ActErrno, ErrnoRet: new(uint(0))},
				},
			},
			RootfsPropagation: "slave", MaskedPaths: []string{"/m"}, ReadonlyPaths: []string{"/r"},
		},
	}
	want := &protocol.Spec{
		Version: "1.2.0", Hostname: "h", Domainname: "d", Annotations: map[string]string{"a": "b"},
		Root: &protocol.Root{Path: "/r", Readonly: true},
		Process: &protocol.Process{
			Terminal: true, ConsoleSize: &protocol.Box{Height: 24, Width: 65535},
			User: &protocol.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}, Umask: new(uint32(0o22))},
			Args: []string{"a"}, Env: []string{"E=1"}, Cwd: "/c",
			Capabilities: &protocol.LinuxCapabilities{Bounding: []string{"B"}, Effective: []string{"E"}, Inheritable: []string{"I"}, Permitted: []string{"P"}, Ambient: []string{"A"}},
			Rlimits:      []*protocol.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 2, Soft: 1}}, NoNewPrivileges: true, OOMScoreAdj: -5,
		},
		Mounts: []*protocol.Mount{{Destination: "/d", Source: "s", Type: "t", Options: []string{"o"}}},
		Linux: &protocol.Linux{
			UIDMappings: []*protocol.LinuxIDMapping{{ContainerID: 1, HostID: 2, Size: 3}},
			GIDMappings: []*protocol.LinuxIDMapping{{ContainerID: 4, HostID: 5, Size: 6}},
			Sysctl:      map[string]string{"net.x": "1"},
			CgroupsPath: "/cg", Namespaces: []*protocol.LinuxNamespace{{Type: "pid"}},
			Devices: []*protocol.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3, FileMode: 0o1666, UID: 1, GID: 2}},
			Resources: &protocol.LinuxResources{
				Devices: []*protocol.LinuxDeviceCgroup{{Type: "a", Major: -1, Minor: -1, Access: "rwm"}, {Allow: true, Type: "c", Major: 0, Minor: 3, Access: "r"}},
				Memory:  &protocol.LinuxMemory{Limit: 1, Reservation: 2, Swap: -1, Kernel: 4, KernelTCP: 5, Swappiness: 6, DisableOOMKiller: true},
				CPU: &protocol.LinuxCPU{
					Shares: 1, Quota: 2, Period: 3, RealtimeRuntime: 4, RealtimePeriod: 5, Cpus: "c", Mems: "m",
				},
				Pids:           &protocol.LinuxPids{Limit: -1},
				HugepageLimits: []*protocol.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 7}},
				Unified:        map[string]string{"u": "v"},
			},
			Seccomp: &protocol.LinuxSeccomp{
				DefaultAction: "SCMP_ACT_ERRNO", DefaultErrnoRet: new(uint32(38)), Architectures: []string{"SCMP_ARCH_X86_64"},
				Flags: []string{"SECCOMP_FILTER_FLAG_LOG"},
				Syscalls: []*protocol.LinuxSyscall{
					{Names: []string{"a"}, Action: "SCMP_ACT_ALLOW", Args: []*protocol.LinuxSeccompArg{{Index: 1, Value: 2, ValueTwo: 3, Op: "SCMP_CMP_EQ"}}},
					{Names: []string{"b"}, Action: "SCMP_ACT_ERRNO", ErrnoRet: &protocol.LinuxSyscall_Errnoret{}},
				},
			},
			RootfsPropagation: "slave", MaskedPaths: []string{"/m"}, ReadonlyPaths: []string{"/r"},
		},
	}
	if diff := cmp.Diff(want, wireSpec(in), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	// Nothing that is optional is needed.
	wireSpec(&specs.Spec{Process: &specs.Process{}, Root: &specs.Root{}, Linux: &specs.Linux{}})
}

func TestStatusTable(t *testing.T) {
	for from, ways := range next {
		for _, to := range ways {
			if !from.leads(to) {
				t.Errorf("no way from %s to %s", from, to)
			}
		}
		if from.leads(from) || from.leads(Created) {
			t.Errorf("%s leads back", from)
		}
	}
	if Stopped.leads(Running) {
		t.Error("the end has a way back")
	}
}
