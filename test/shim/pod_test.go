package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	stats1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	stats2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/typeurl/v2"
)

func (t *tasks) annotate(kind, sandbox string) *tasks {
	t.spec.Annotations = map[string]string{
		"io.kubernetes.cri.container-type": kind,
		"io.kubernetes.cri.sandbox-id":     sandbox,
	}
	return t
}

// The containers of a pod share a machine and a shim; each comes and goes by
// itself, and the pod's own takes the machine with it. Of the pod's network they
// have nothing, as configured.
func TestShimPod(t *testing.T) {
	h := newHost(t, "network = { model = 'none' }")
	p := h.lan().pod("a", 2)
	pod := h.bundle("pod", "sleep", "1000").annotate("sandbox", "pod").joins(p).run()
	a := h.bundle("a", "sh", "-c", "exit 6").annotate("container", "pod").run()
	if a.address != pod.address {
		t.Errorf("address of a member %q, want the pod's %q", a.address, pod.address)
	}
	if code := a.wait(""); code != 6 {
		t.Errorf("exit code %d, want 6", code)
	}
	h.sink.want(t, "exit a a 6")
	b := h.bundle("b", "sleep", "1000").annotate("container", "pod").run()
	a.delete() // and the delete command beside a shim that lives on
	b.wantStatus(task.Status_RUNNING)
	pod.wantStatus(task.Status_RUNNING)
	if out := b.sh("ip -o link"); strings.Count(out, "\n") != 1 || !strings.Contains(out, "lo:") {
		t.Errorf("interfaces without a network: %s", out)
	}
	if text, err := os.ReadFile(filepath.Join(b.bundle, "address")); err != nil || string(text) != pod.address {
		t.Errorf("address in the bundle of a member: %q, %v", text, err)
	}
	// As containerd 2.3 and later: without start.
	c := h.bundle("c", "sleep", "1000").annotate("container", "pod")
	text, err := json.Marshal(c.spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.bundle, "config.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	c.address = pod.address
	c.connect()
	c.create().startTask()
	_, err = c.Create(c.ctx(), c.createRequest())
	c.wantClass("Create twice", errdefs.IsAlreadyExists, err)
	b.end()
	c.end()
	pod.end()
	p.clean(h)
	h.sink.wantNoMore(t)
}

// pidNamespace has a container join the pid namespace of another task.
func (t *tasks) pidNamespace(of *tasks) *tasks {
	for i, ns := range t.spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace {
			t.spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/pid", of.pid)
		}
	}
	return t
}

// output is what a command in the container writes.
func (t *tasks) output(execID string, args ...string) string {
	t.Helper()
	f := t.fifos(t.id+execID, false).read()
	t.exec(execID, f, nil, args...)
	code := t.wait(execID)
	t.sink.want(t.TB, fmt.Sprintf("exit %s %s %d", t.id, execID, code))
	t.deleteExec(execID)
	return f.output()
}

// hugePages is a volume of them on the host, as the kubelet makes it.
func (h *host) hugePages() string {
	h.Helper()
	dir := filepath.Join(h.dir, "huge")
	if err := os.Mkdir(dir, 0o755); err != nil {
		h.Fatal(err)
	}
	if err := unix.Mount("nodev", dir, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			h.Error(err)
		}
	})
	return dir
}

// Containers of a pod share what they ask for, and no more; one may come again.
func TestShimPodShares(t *testing.T) {
	h := newHost(t)
	huge := h.hugePages()
	pod := h.bundle("pod", "none").annotate("sandbox", "pod").run()
	a := h.bundle("a", "sh", "-c", "sleep 1001; :").annotate("container", "pod").pidNamespace(pod).run()
	b := h.bundle("b", "sleep", "1002").annotate("container", "pod").pidNamespace(pod).run()
	c := h.bundle("c", "sleep", "1003").annotate("container", "pod").run()
	target := h.bundle("target", "sleep", "1004").annotate("container", "pod").pidNamespace(c).run()
	const list = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; done | grep -o 'sleep 100[0-9]' | sort -u"
	for i, tt := range []struct {
		of   *tasks
		want string
	}{
		{a, "sleep 1001\nsleep 1002\n"},
		{b, "sleep 1001\nsleep 1002\n"},
		{c, "sleep 1003\nsleep 1004\n"},
		{target, "sleep 1003\nsleep 1004\n"},
	} {
		if got := tt.of.output(fmt.Sprintf("ps%d", i), "sh", "-c", list); got != tt.want {
			t.Errorf("%s sees %q, want %q", tt.of.id, got, tt.want)
		}
	}
	if got := a.output("comm", "cat", "/proc/1/comm"); got != "pause\n" {
		t.Errorf("the first process of the pod is %q", got)
	}
	// Huge pages are the guest's, and one volume for all who have it.
	for i, id := range []string{"huge", "huger"} {
		d := h.bundle(id, "sleep", "1000").annotate("container", "pod")
		d.spec.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 8 << 20}}
		d.spec.Mounts = append(d.spec.Mounts, specs.Mount{Type: "bind", Source: huge, Destination: "/huge", Options: []string{"rbind"}})
		d.run()
		script := "grep ' /huge ' /proc/mounts; grep HugePages_Total /proc/meminfo; ls /huge; mkdir /huge/" + id
		want := "nodev /huge hugetlbfs rw,relatime,pagesize=2M,size=8388608 0 0\nHugePages_Total:       4\n" + []string{"", "huge\n"}[i]
		if got := d.output("look", "sh", "-c", script); got != want {
			t.Errorf("huge pages: %q, want %q", got, want)
		}
		d.end()
	}
	refused := h.bundle("refused", "true").annotate("container", "pod")
	refused.spec.Mounts = append(refused.spec.Mounts, specs.Mount{Type: "bind", Source: huge, Destination: "/huge", Options: []string{"rbind"}})
	refused.start()
	_, err := refused.Create(refused.ctx(), refused.createRequest())
	refused.wantClass("Create without a limit of huge pages", errdefs.IsInvalidArgument, err)
	// The pod's first process outlives those that share its namespace, and reaps.
	a.end()
	for _, dir := range []string{a.bundle, filepath.Join(h.dir, "f", "a")} { // as containerd does
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	a = h.bundle("a", "sleep", "1005").annotate("container", "pod").pidNamespace(pod).run()
	if got := b.output("again", "sh", "-c", list); got != "sleep 1002\nsleep 1005\n" {
		t.Errorf("after one came again: %q", got)
	}
	if got := b.output("zombies", "sh", "-c", "cat /proc/[0-9]*/stat | grep -c ' Z '"); got != "0\n" {
		t.Errorf("%q zombies", got)
	}
	for _, c := range []*tasks{target, c, b, a, pod} {
		c.end()
	}
	h.sink.wantNoMore(t)
}

func TestShimUpdateAndStats(t *testing.T) {
	h := newHost(t)
	c := h.bundle("res", "sh", "-c", "while :; do :; done")
	limit, quota, period := int64(64<<20), int64(50000), uint64(100000)
	c.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	c.spec.Linux.Resources.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	c.spec.Mounts = append(c.spec.Mounts, specs.Mount{
		Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"},
	})
	c.spec.Linux.Namespaces = append(c.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	c.run()
	limits := func(id string) string {
		f := h.fifos(id, false).read()
		c.exec(id, f, nil, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max")
		c.wait(id)
		out := f.output()
		h.sink.want(t, "exit res "+id+" 0")
		c.deleteExec(id)
		return out
	}
	if got := limits("e1"); got != "67108864\n50000 100000\n" {
		t.Errorf("limits %q", got)
	}
	limit, quota = 48<<20, 20000
	text, err := json.Marshal(&specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period},
	})
	if err != nil {
		t.Fatal(err)
	}
	r := &taskapi.UpdateTaskRequest{ID: c.id, Resources: &anypb.Any{
		TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", Value: text,
	}}
	if _, err := c.Update(c.ctx(), r); err != nil {
		t.Fatalf("Update: %v", err)
	}
	if got := limits("e2"); got != "50331648\n20000 100000\n" {
		t.Errorf("limits after the update %q", got)
	}

	s, err := c.Stats(c.ctx(), &taskapi.StatsRequest{ID: c.id})
	if err != nil {
		t.Fatalf("Stats: %v", err)
	}
	v, err := typeurl.UnmarshalAny(s.GetStats())
	if err != nil {
		t.Fatal(err)
	}
	_, err = os.Stat("/sys/fs/cgroup/cgroup.controllers")
	switch m := v.(type) {
	case *stats1.Metrics:
		if err == nil {
			t.Error("metrics of version 1 on a host with version 2")
		}
		if m.GetCPU().GetUsage().GetTotal() == 0 || m.GetMemory().GetUsage().GetUsage() == 0 || m.GetMemory().GetUsage().GetLimit() != uint64(limit) || m.GetPids().GetCurrent() != 1 {
			t.Errorf("metrics %v", m)
		}
	case *stats2.Metrics:
		if err != nil {
			t.Error("metrics of version 2 on a host with version 1")
		}
		if m.GetCPU().GetUsageUsec() == 0 || m.GetMemory().GetUsage() == 0 || m.GetMemory().GetUsageLimit() != uint64(limit) || m.GetPids().GetCurrent() != 1 {
			t.Errorf("metrics %v", m)
		}
	default:
		t.Errorf("metrics are %T", v)
	}
	c.end()
}

// A daemon that is told to end says how its task ended, and leaves nothing.
func TestShimTerminated(t *testing.T) {
	h := newHost(t)
	c := h.bundle("term", "sleep", "1000").run()
	if err := unix.Kill(h.find("-id\x00term\x00"), unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(""); code != 137 {
		t.Errorf("exit code %d, want 137", code)
	}
	h.sink.want(t, "exit term term 137")
	if r := c.cleanup(); r.GetExitStatus() != 137 {
		t.Errorf("answer %v", r)
	}
}
