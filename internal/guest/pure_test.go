package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func TestClamp(t *testing.T) {
	tests := []struct{ list, have, want string }{
		{"", "0-3", ""},
		{"0-7", "0-1", "0-1"},
		{"0,2-3,9", "0-3", "0,2-3"},
		{"1,3", "0-3\n", "1,3"},
		{"5-6", "0", ""},
		{"x", "0", ""},
		{"3-1", "0-3", ""},
		{"0-99999", "0-3", ""},
		{"0", "", ""},
	}
	for _, test := range tests {
		if got := clamp(test.list, test.have); got != test.want {
			t.Errorf("%q of %q: got %q, want %q", test.list, test.have, got, test.want)
		}
	}
}

func FuzzParseList(f *testing.F) {
	for _, s := range []string{"", "0", "0-3,5", "7-", "-7", ",", "1-1", "8191", "8192", "0-8191", "00,0x1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		set, ok := parseList(s)
		if !ok {
			return
		}
		if len(set) > maxCPU {
			t.Errorf("%d cpus", len(set))
		}
		again, ok := parseList(formatList(set))
		if !ok && slices.Contains(set, true) || ok && !slices.Equal(set, again) {
			t.Errorf("%q became %q", s, formatList(set))
		}
	})
}

func TestNoticesSignal(t *testing.T) {
	const status = "Name:\tsh\nSigQ:\t0/123\nSigPnd:\t0000000000004000\nSigBlk:\t0000000000000001\n" +
		"SigIgn:\t0000000000000002\nSigCgt:\t0000000000004000\n"
	for sig, want := range map[unix.Signal]bool{1: true, 2: true, 15: true, 9: false, 14: false, 64: false} {
		if got := noticesSignal(status, sig); got != want {
			t.Errorf("signal %d: got %v, want %v", sig, got, want)
		}
	}
	if noticesSignal("SigCgt: zzz\nSigBlk", 15) || noticesSignal("", 15) {
		t.Error("garbage notices")
	}
	// The test itself handles SIGTERM: Go does.
	if ignorant(os.Getpid(), unix.SIGTERM) {
		t.Error("this process ignores SIGTERM")
	}
}

func FuzzNoticesSignal(f *testing.F) {
	f.Add("SigCgt:\t0000000000004000\n", uint8(15))
	f.Add("SigBlk:\tffffffffffffffff", uint8(64))
	f.Add("\n::\nSigIgn:", uint8(1))
	f.Fuzz(func(_ *testing.T, status string, sig uint8) {
		noticesSignal(status, unix.Signal(sig%maxSignal+1))
	})
}

func TestParseKeyed(t *testing.T) {
	got := parseKeyed("low 0\nhigh 3\n\noom_kill 2\nbad x\nalone\n")
	if diff := cmp.Diff(map[string]uint64{"low": 0, "high": 3, "oom_kill": 2}, got); diff != "" {
		t.Error(diff)
	}
}

func TestMountOptions(t *testing.T) {
	tests := []struct {
		options []string
		flags   uintptr
		data    string
	}{
		{nil, 0, ""},
		{[]string{"ro", "nosuid", "size=1m", "mode=1777"}, unix.MS_RDONLY | unix.MS_NOSUID, "size=1m,mode=1777"},
		{[]string{"ro", "rw", "defaults", ""}, 0, ""},
		{[]string{"rbind"}, unix.MS_BIND | unix.MS_REC, ""},
		{[]string{"lowerdir=/a:/b"}, 0, "lowerdir=/a:/b"},
	}
	for _, test := range tests {
		flags, data := mountOptions(test.options)
		if flags != test.flags || data != test.data {
			t.Errorf("%v: got %#x, %q", test.options, flags, data)
		}
	}
}

func TestSplitGroup(t *testing.T) {
	rest, gid, err := splitGroup([]string{"size=1m", "fsgid=5", "ro"})
	if err != nil || gid != 5 || !slices.Equal(rest, []string{"size=1m", "ro"}) {
		t.Errorf("got %v, %d, %v", rest, gid, err)
	}
	if _, gid, _ := splitGroup(nil); gid != -1 {
		t.Errorf("no group is %d", gid)
	}
	if _, _, err := splitGroup([]string{"fsgid=-1"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}

func TestMergeResources(t *testing.T) {
	old := &cgroups.Resources{
		Memory: 100, MemorySwap: 150, CpuQuota: 10, CpuPeriod: 1000, CpuWeight: 7, CpusetCpus: "0",
		PidsLimit: new(int64(5)), Unified: map[string]string{"memory.high": "1"},
	}
	tests := []struct {
		name   string
		update *protocol.LinuxResources
		check  func(r *cgroups.Resources) bool
	}{
		{"nothing", &protocol.LinuxResources{}, func(r *cgroups.Resources) bool {
			return r.Memory == 100 && r.MemorySwap == 150 && r.CpuQuota == 10 && *r.PidsLimit == 5 && r.CpusetCpus == "0" && r.Unified == nil
		}},
		{"a higher limit keeps the swap", mem(200, 0), func(r *cgroups.Resources) bool { return r.Memory == 200 && r.MemorySwap == 250 }},
		{"a lower limit keeps the swap", mem(60, 0), func(r *cgroups.Resources) bool { return r.Memory == 60 && r.MemorySwap == 110 }},
		{"both", mem(200, 200), func(r *cgroups.Resources) bool { return r.Memory == 200 && r.MemorySwap == 200 }},
		{"no limit", mem(-1, 0), func(r *cgroups.Resources) bool { return r.Memory == -1 && r.MemorySwap == 0 }},
		{"cpu", &protocol.LinuxResources{CPU: &protocol.LinuxCPU{Quota: -1, Shares: 1024, Mems: "0"}}, func(r *cgroups.Resources) bool {
			return r.CpuQuota == -1 && r.CpuPeriod == 1000 && r.CpuShares == 1024 && r.CpuWeight == cgroups.ConvertCPUSharesToCgroupV2Value(1024) && r.CpusetMems == "0"
		}},
		{"pids", &protocol.LinuxResources{Pids: &protocol.LinuxPids{Limit: 9}}, func(r *cgroups.Resources) bool { return *r.PidsLimit == 9 }},
		{"unified", &protocol.LinuxResources{Unified: map[string]string{"memory.low": "2"}}, func(r *cgroups.Resources) bool { return r.Unified["memory.low"] == "2" }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := mergeResources(old, test.update)
			if !test.check(got) {
				t.Errorf("got %+v", got)
			}
			// What libcontainer would refuse must not come out.
			if _, err := cgroups.ConvertMemorySwapToCgroupV2Value(got.MemorySwap, got.Memory); err != nil {
				t.Error(err)
			}
			if old.Memory != 100 || *old.PidsLimit != 5 || old.Unified == nil {
				t.Error("the old limits were changed")
			}
		})
	}
}

func mem(limit, swap int64) *protocol.LinuxResources {
	return &protocol.LinuxResources{Memory: &protocol.LinuxMemory{Limit: limit, Swap: swap}}
}

func TestToStats(t *testing.T) {
	in := cgroups.NewStats()
	in.MemoryStats.Usage.Usage, in.MemoryStats.SwapUsage.Usage, in.MemoryStats.SwapOnlyUsage.Usage = 10, 13, 3
	in.MemoryStats.Stats["anon"] = 4
	in.HugetlbStats["2MB"] = cgroups.HugetlbStats{Usage: 5}
	in.BlkioStats.IoServiceBytesRecursive = []cgroups.BlkioStatEntry{{Major: 254, Op: "Read", Value: 6}}
	out := toStats(in, map[string]uint64{"oom_kill": 1})
	if out.GetMemoryStats().GetSwapUsage().GetUsage() != 3 || out.GetMemoryStats().GetStats()["anon"] != 4 ||
		out.GetHugetlbStats()["2MB"].GetUsage() != 5 || out.GetMemoryEvents()["oom_kill"] != 1 ||
		out.GetBlkioStats().GetIoServiceBytesRecursive()[0].GetMajor() != 254 {
		t.Errorf("got %v", out)
	}
}

func TestLookUser(t *testing.T) {
	passwd := []byte("root:x:0:0::/:/\nalice:x:1000:1001::/:/\n")
	group := []byte("staff:x:50:alice\nusers:x:1001:\n")
	tests := []struct {
		from *protocol.StringUser
		uid  uint32
		gid  uint32
		gids []uint32
	}{
		{&protocol.StringUser{Uid: "alice"}, 1000, 1001, []uint32{50}},
		{&protocol.StringUser{Uid: "1000"}, 1000, 1001, []uint32{50}},
		{&protocol.StringUser{Uid: "7", Gid: "8"}, 7, 8, nil},
		{&protocol.StringUser{Uid: "alice", Gid: "staff", AdditionalGids: []string{"9"}}, 1000, 50, []uint32{9}},
		{&protocol.StringUser{}, 0, 0, nil},
	}
	for _, test := range tests {
		spec := toSpec(&protocol.Spec{Process: &protocol.Process{User: &protocol.User{UID: 3, AdditionalGids: []uint32{4}}}})
		u := &spec.Process.User
		err := lookUser(u, test.from, passwd, group)
		if err != nil || u.UID != test.uid || u.GID != test.gid || !slices.Equal(u.AdditionalGids, test.gids) {
			t.Errorf("%v: got %+v, %v", test.from, u, err)
		}
	}
	for _, from := range []*protocol.StringUser{{Uid: "bob"}, {Uid: "-5"}, {Uid: "alice", Gid: "nogroup"}, {Uid: "alice", AdditionalGids: []string{"nogroup"}}} {
		spec := toSpec(&protocol.Spec{Process: &protocol.Process{}})
		if err := lookUser(&spec.Process.User, from, passwd, group); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v, want invalid argument", from, err)
		}
	}
}

func TestReadInRoot(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(root+"/etc", 0o755); err != nil {
		t.Fatal(err)
	}
	if b, err := readInRoot(root, "etc/passwd"); err != nil || b != nil {
		t.Errorf("missing: %q, %v", b, err)
	}
	// An absolute link stays in the root.
	if err := os.Symlink("/etc/real", root+"/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/etc/real", []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := readInRoot(root, "etc/passwd"); err != nil || string(b) != "mine" {
		t.Errorf("link: %q, %v", b, err)
	}
	// A fifo is not waited for.
	if err := unix.Mkfifo(root+"/etc/group", 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readInRoot(root, "etc/group"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("fifo: %v", err)
	}
}

func TestMetrics(t *testing.T) {
	var out strings.Builder
	writeMeminfo(&out, "MemTotal:  10 kB\nActive(anon): 2 kB\nHugePages_Total: 3\nbad: x kB\n")
	writeLoad(&out, "0.10 0.20 0.30 1/2 3\n")
	writeLoad(&out, "x")
	writeAgent(&out, "Name: x\nThreads: 7\nVmRSS:\t  8 kB\n")
	for _, want := range []string{
		"kata_guest_meminfo{item=\"memtotal\"} 10240\n", "{item=\"active_anon\"} 2048\n", "{item=\"hugepages_total\"} 3\n",
		"kata_guest_load{item=\"load15\"} 0.30\n", "kata_agent_threads 7\n", "kata_agent_total_rss 8192\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "bad") {
		t.Error("what is not a number is there")
	}
}

func TestIsStray(t *testing.T) {
	group := containerCgroup("c")
	for _, tt := range []struct {
		name, stat, cgroup string
		want               bool
	}{
		{"a zombie in the group", "7 (runc:[1:CHILD]) Z 5 7 0", "0::/vmshim/c\n", true},
		{"of hybrid control groups", "7 (x) S 5 7 0", "3:pids:/x\n0::/vmshim/c\n", true},
		{"with a name that looks like more", "7 (x) Z 6 (y) Z 5 1", "0::/vmshim/c\n", true},
		{"a child of another", "7 (x) Z 6 5 5", "0::/vmshim/c\n", false},
		{"in another group", "7 (x) Z 5 7 0", "0::/vmshim/c2\n", false},
		{"below the group", "7 (x) Z 5 7 0", "0::/vmshim/c/d\n", false},
		{"nothing", "", "", false},
	} {
		proc := t.TempDir()
		for name, text := range map[string]string{"stat": tt.stat, "cgroup": tt.cgroup} {
			if err := os.WriteFile(filepath.Join(proc, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := isStray(proc, 5, group); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
	if isStray(t.TempDir(), 5, group) {
		t.Error("one that is gone")
	}
}
