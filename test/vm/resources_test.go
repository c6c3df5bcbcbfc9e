package vm

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// hostFile is a file of a container as the host sees it.
func (m *machine) hostFile(id, name string) string { return filepath.Join(m.Share, id, "rootfs", name) }

func (m *machine) fileExists(id, name string) bool {
	_, err := os.Stat(m.hostFile(id, name))
	return err == nil
}

func (m *machine) eventually(what string, f func() bool) {
	m.tb.Helper()
	for range 300 {
		if f() {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	m.tb.Fatalf("never: %s", what)
}

// inContainer runs a command in a running container and returns its output.
func (m *machine) inContainer(id string, args ...string) string {
	m.tb.Helper()
	out, _ := m.exec(id, "probe", nil, args...)
	return strings.TrimSpace(out)
}

func (m *machine) comm(id string) string { return m.inContainer(id, "/bin/cat", "/proc/1/comm") }

const counter = "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.05; done"

func (m *machine) count(id string) int {
	b, _ := os.ReadFile(m.hostFile(id, "count"))
	n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return n
}

func testPause(t *testing.T, m *machine) {
	m.create("pause", nil, "/bin/sh", "-c", counter)
	_, err := m.agent.PauseContainer(m.ctx(), &protocol.PauseContainerRequest{ContainerId: "pause"})
	wantClass(t, "pause of a created container", err, errdefs.ErrFailedPrecondition)
	m.startContainer("pause")
	m.eventually("it counts", func() bool { return m.count("pause") > 3 })
	if _, err := m.agent.PauseContainer(m.ctx(), &protocol.PauseContainerRequest{ContainerId: "pause"}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond) // what was on its way
	before := m.count("pause")
	time.Sleep(500 * time.Millisecond)
	if after := m.count("pause"); after != before {
		t.Errorf("counted from %d to %d while paused", before, after)
	}
	_, err = m.agent.ExecProcess(m.ctx(), &protocol.ExecProcessRequest{ContainerId: "pause", ExecId: "e", Process: process("/bin/true")})
	wantClass(t, "exec while paused", err, errdefs.ErrFailedPrecondition)
	if _, err := m.agent.ResumeContainer(m.ctx(), &protocol.ResumeContainerRequest{ContainerId: "pause"}); err != nil {
		t.Fatal(err)
	}
	m.eventually("it goes on", func() bool { return m.count("pause") > before })
	_, err = m.agent.ResumeContainer(m.ctx(), &protocol.ResumeContainerRequest{ContainerId: "pause"})
	wantClass(t, "resume of a running container", err, errdefs.ErrFailedPrecondition)
	// A paused container can be killed and removed.
	if _, err := m.agent.PauseContainer(m.ctx(), &protocol.PauseContainerRequest{ContainerId: "pause"}); err != nil {
		t.Fatal(err)
	}
	m.signal("pause", "pause", 9, false)
	if got := m.wait("pause", "pause").GetStatus(); got != 137 {
		t.Errorf("status %d", got)
	}
	m.remove("pause")
}

func testUpdate(t *testing.T, m *machine) {
	m.create("update", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Resources = &protocol.LinuxResources{
			Memory:  &protocol.LinuxMemory{Limit: 64 * mib, Swap: 64 * mib},
			CPU:     &protocol.LinuxCPU{Shares: 512, Quota: 50000, Period: 100000, Cpus: "0-7"},
			Pids:    &protocol.LinuxPids{Limit: 50},
			Unified: map[string]string{"memory.high": "60000000"},
		}
	}, "/bin/sleep", "1000")
	m.startContainer("update")
	defer m.remove("update")
	files := []string{"memory.max", "cpu.max", "pids.max", "cpuset.cpus", "memory.high"}
	read := func() string {
		args := []string{"/bin/cat"}
		for _, f := range files {
			args = append(args, "/sys/fs/cgroup/"+f)
		}
		return m.inContainer("update", args...)
	}
	if diff := cmp.Diff("67108864\n50000 100000\n50\n0\n59998208", read()); diff != "" {
		t.Errorf("at first (-want +got):\n%s", diff)
	}
	_, err := m.agent.UpdateContainer(m.ctx(), &protocol.UpdateContainerRequest{ContainerId: "update", Resources: &protocol.LinuxResources{
		Memory: &protocol.LinuxMemory{Limit: 96 * mib},
		CPU:    &protocol.LinuxCPU{Quota: 20000, Cpus: "5-6"},
		Pids:   &protocol.LinuxPids{Limit: 60},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("100663296\n20000 100000\n60\n0\n59998208", read()); diff != "" {
		t.Errorf("after the update (-want +got):\n%s", diff)
	}
}

func testStats(t *testing.T, m *machine) {
	m.create("stats", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Resources.Memory = &protocol.LinuxMemory{Limit: 64 * mib}
		r.OCI.Linux.Resources.Pids = &protocol.LinuxPids{Limit: 33}
	}, "/bin/sh", "-c", "while :; do :; done")
	m.startContainer("stats")
	stats := func() *protocol.CgroupStats {
		resp, err := m.agent.StatsContainer(m.ctx(), &protocol.StatsContainerRequest{ContainerId: "stats"})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetCgroupStats()
	}
	first := stats()
	time.Sleep(700 * time.Millisecond)
	second := stats()
	if d := second.GetCpuStats().GetCpuUsage().GetTotalUsage() - first.GetCpuStats().GetCpuUsage().GetTotalUsage(); d < 100e6 {
		t.Errorf("cpu went up by %d ns", d)
	}
	mem := second.GetMemoryStats()
	if mem.GetUsage().GetLimit() != 64*mib || mem.GetUsage().GetUsage() == 0 || mem.GetStats()["anon"] == 0 {
		t.Errorf("memory: %v", mem)
	}
	if p := second.GetPidsStats(); p.GetCurrent() != 1 || p.GetLimit() != 33 {
		t.Errorf("pids: %v", p)
	}
	if _, ok := second.GetMemoryEvents()["oom_kill"]; !ok {
		t.Errorf("memory events: %v", second.GetMemoryEvents())
	}
	m.signal("stats", "stats", 9, false)
	m.wait("stats", "stats")
	if after := stats(); after.GetCpuStats().GetCpuUsage().GetTotalUsage() == 0 {
		t.Error("no stats after the exit")
	}
	m.remove("stats")
}

func testOOM(t *testing.T, m *machine) {
	events := make(chan string, 10)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		for {
			e, err := m.agent.GetOOMEvent(ctx, &protocol.GetOOMEventRequest{})
			if err != nil {
				return
			}
			events <- e.GetContainerId()
		}
	}()
	limit := func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Resources.Memory = &protocol.LinuxMemory{Limit: 24 * mib, Swap: 24 * mib}
	}
	m.create("hog", limit, "/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=60M", "count=1")
	m.startContainer("hog")
	resp := m.wait("hog", "hog")
	if resp.GetStatus() != 137 || !resp.GetOomKilled() {
		t.Errorf("the hog: %v", resp)
	}
	select {
	case id := <-events:
		if id != "hog" {
			t.Errorf("event of %q", id)
		}
	case <-time.After(vmtest.Within(10 * time.Second)):
		t.Error("no event")
	}
	m.remove("hog")

	// Not the first process: an event while the container goes on.
	m.create("hog2", limit, "/bin/sh", "-c", "dd if=/dev/zero of=/dev/null bs=60M count=1; touch /survived; sleep 1000")
	m.startContainer("hog2")
	select {
	case id := <-events:
		if id != "hog2" {
			t.Errorf("event of %q", id)
		}
	case <-time.After(vmtest.Within(20 * time.Second)):
		t.Error("no event")
	}
	m.eventually("it goes on", func() bool { return m.fileExists("hog2", "survived") })
	m.remove("hog2")

	out, _, _ := m.run("modest", limit, "/bin/echo", "x")
	if out != "x\n" {
		t.Errorf("got %q", out)
	}
	m.create("modest", limit, "/bin/true")
	m.startContainer("modest")
	if resp := m.wait("modest", "modest"); resp.GetOomKilled() || resp.GetExitedAt() == 0 {
		t.Errorf("no hog: %v", resp)
	}
	m.remove("modest")
}

func testPIDNamespace(t *testing.T, m *machine) {
	shared := func(r *protocol.CreateContainerRequest) { r.SandboxPidns = true }
	m.create("one", shared, "/bin/sleep", "1000")
	m.startContainer("one")
	m.create("two", shared, "/bin/sh", "-c", "sleep 1000 & wait")
	m.startContainer("two")
	m.create("three", nil, "/bin/sleep", "1000")
	m.startContainer("three")
	ns := func(id string) string { return m.inContainer(id, "/bin/readlink", "/proc/self/ns/pid") }
	// The first container of the sandbox gave its namespace; it may be long gone.
	if a, b := ns("two"), ns("three"); a == b {
		t.Errorf("two %s, three %s", a, b)
	}
	if a, b := ns("one"), ns("two"); a != b {
		t.Errorf("one %s, two %s", a, b)
	}
	m.eventually("its children", func() bool { return len(m.pids("two")) == 2 })
	m.signal("two", "two", 9, false)
	if got := m.wait("two", "two").GetStatus(); got != 137 {
		t.Errorf("status %d", got)
	}
	m.eventually("all of it ends", func() bool { return len(m.pids("two")) == 0 })
	m.remove("two")
	m.remove("three")
	m.remove("one")
}

func testSysctls(t *testing.T, m *machine) {
	out, _, _ := m.run("sysctl", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Sysctl = map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "7", "net.ipv4.ping_group_range": "0 2147483647", "kernel.shm_rmid_forced": "1",
		}
	}, "/bin/cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/kernel/shm_rmid_forced")
	if out != "7\n1\n" {
		t.Errorf("got %q", out)
	}
	err := m.tryCreate("sysctl", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Sysctl = map[string]string{"vm.swappiness": "1"}
	}, "/bin/true")
	if err == nil || !strings.Contains(err.Error(), "vm.swappiness") {
		t.Errorf("a sysctl of the whole guest: %v", err)
	}
}

func testSeccomp(t *testing.T, m *machine) {
	out, _, _ := m.run("seccomp", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Seccomp = &protocol.LinuxSeccomp{
			DefaultAction: "SCMP_ACT_ALLOW",
			Syscalls: []*protocol.LinuxSyscall{{
				Names: []string{"mkdir", "mkdirat"}, Action: "SCMP_ACT_ERRNO",
				ErrnoRet: &protocol.LinuxSyscall_Errnoret{Errnoret: 28},
			}},
		}
		r.OCI.Process.ApparmorProfile, r.OCI.Process.SelinuxLabel = "docker-default", "system_u:system_r:container_t:s0"
		r.OCI.Linux.MountLabel = "system_u:object_r:container_file_t:s0"
	}, "/bin/sh", "-c", "busybox mkdir /tmp/x 2>&1; grep Seccomp: /proc/self/status")
	if !strings.Contains(out, "No space left") || !strings.Contains(out, "Seccomp:\t2") {
		t.Errorf("got %q", out)
	}
}

func testStorages(t *testing.T, m *machine) {
	const root = "/run/kata-containers/"
	if err := os.MkdirAll(filepath.Join(m.Share, "lower"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.Share, "lower", "below"), []byte("from below\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	shared := &protocol.Storage{
		Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: root + "sandbox/ephemeral/vol",
		Options: []string{"size=1m", "noexec", "fsgid=77"},
	}
	use := func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{
			shared,
			{Driver: "local", Source: "local", MountPoint: shareDir + "/local/dir", Options: []string{"mode=0770", "fsgid=78"}},
			{Driver: "overlayfs", Source: "none", Fstype: "overlay", MountPoint: root + "overlay/" + r.ContainerId, Options: []string{"lowerdir=" + shareDir + "/lower", "io.katacontainers.fs-opt.overlay-rw"}},
			{Driver: "bind", Source: shareDir + "/lower", MountPoint: root + "bound/" + r.ContainerId, Options: []string{"ro"}},
		}
		for dst, src := range map[string]string{"/vol": root + "sandbox/ephemeral/vol", "/local": shareDir + "/local/dir", "/over": root + "overlay/" + r.ContainerId, "/bound": root + "bound/" + r.ContainerId} {
			r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: dst, Source: src, Type: "bind", Options: []string{"rbind"}})
		}
	}
	m.create("s1", use, "/bin/sleep", "1000")
	m.create("s2", use, "/bin/sleep", "1000")
	m.startContainer("s1")
	m.startContainer("s2")
	m.inContainer("s1", "/bin/sh", "-c", "echo hi > /vol/f; echo up > /over/below; echo x > /local/f")
	got := m.inContainer("s2", "/bin/sh", "-c", "cat /vol/f /over/below /bound/below; busybox stat -c '%A %g' /vol /local; touch /bound/x 2>&1; busybox df /vol | busybox awk 'END{print $2}'")
	want := "hi\n" + strings.Repeat("from below\n", 2) + "drwxrwsrwt 77\ndrwxrws--- 78\ntouch: /bound/x: Read-only file system\n1024"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := m.inContainer("s1", "/bin/cat", "/over/below"); got != "up" {
		t.Errorf("the upper layer has %q", got)
	}
	m.remove("s1")
	if got := m.inContainer("s2", "/bin/cat", "/vol/f"); got != "hi" {
		t.Errorf("after one user has gone: %q", got)
	}
	m.remove("s2")
	// Gone with the last user: the next one starts empty.
	m.create("s1", use, "/bin/sleep", "1000")
	m.startContainer("s1")
	if got := m.inContainer("s1", "/bin/sh", "-c", "ls /vol; cat /over/below /local/f"); got != "from below\nx" {
		t.Errorf("a new user sees %q", got)
	}
	m.remove("s1")
}

func testDevices(t *testing.T, m *machine) {
	out, _, _ := m.run("dev", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Devices = []*protocol.LinuxDevice{{Path: "/dev/mine", Type: "c", Major: 5, Minor: 1, FileMode: 0o600}}
	}, "/bin/sh", "-c", "busybox mknod /tmp/mem c 1 1; cat /tmp/mem 2>&1 | head -c 60; (: > /dev/mine) 2>&1 && echo ok")
	if !strings.Contains(out, "Operation not permitted") || !strings.Contains(out, "ok") {
		t.Errorf("got %q", out)
	}
}

func testGuest(t *testing.T, m *machine) {
	details, err := m.agent.GetGuestDetails(m.ctx(), &protocol.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true})
	if err != nil {
		t.Fatal(err)
	}
	a := details.GetAgentDetails()
	if !a.GetInitDaemon() || !a.GetSupportsSeccomp() || a.GetVersion() == "" || details.GetMemBlockSizeBytes() == 0 ||
		!strings.Contains(strings.Join(a.GetStorageHandlers(), " "), "virtio-fs") ||
		!strings.Contains(strings.Join(a.GetExtraFeatures(), " "), extension.FeatureStreams) {
		t.Errorf("details: %v", details)
	}
	v, err := m.health.Version(m.ctx(), &protocol.CheckRequest{})
	if err != nil || v.GetAgentVersion() != a.GetVersion() {
		t.Errorf("version: %v, %v", v, err)
	}
	if _, err := m.agent.SetGuestDateTime(m.ctx(), &protocol.SetGuestDateTimeRequest{Sec: 1e9, Usec: 5}); err != nil {
		t.Error(err)
	}
	out, _, _ := m.run("date", nil, "/bin/busybox", "date", "-u", "+%Y")
	if out != "2001\n" {
		t.Errorf("the guest's year is %q", out)
	}
	now := time.Now()
	if _, err := m.agent.SetGuestDateTime(m.ctx(), &protocol.SetGuestDateTimeRequest{Sec: now.Unix(), Usec: int64(now.Nanosecond() / 1000)}); err != nil {
		t.Error(err)
	}
	if _, err := m.agent.ReseedRandomDev(m.ctx(), &protocol.ReseedRandomDevRequest{Data: random(64)}); err != nil {
		t.Error(err)
	}
	metrics, err := m.agent.GetMetrics(m.ctx(), &protocol.GetMetricsRequest{})
	if err != nil || !strings.Contains(metrics.GetMetrics(), "kata_guest_meminfo{item=\"memtotal\"} ") {
		t.Errorf("metrics: %v, %v", metrics, err)
	}
	ifs, err := m.agent.ListInterfaces(m.ctx(), &protocol.ListInterfacesRequest{})
	if err != nil || len(ifs.GetInterfaces()) != 1 || ifs.GetInterfaces()[0].GetName() != "lo" {
		t.Errorf("interfaces: %v, %v", ifs, err)
	}
	if _, err := m.agent.ListRoutes(m.ctx(), &protocol.ListRoutesRequest{}); err != nil {
		t.Error(err)
	}
	vol, err := m.agent.GetVolumeStats(m.ctx(), &protocol.VolumeStatsRequest{VolumeGuestPath: "/run"})
	if err != nil || len(vol.GetUsage()) != 2 || vol.GetUsage()[0].GetTotal() == 0 {
		t.Errorf("volume: %v, %v", vol, err)
	}
	_, err = m.agent.SetPolicy(m.ctx(), &protocol.SetPolicyRequest{})
	wantClass(t, "SetPolicy", err, errdefs.ErrNotImplemented)
	testCopyFile(t, m)
}

func testCopyFile(t *testing.T, m *machine) {
	copyFile := func(path string, mode uint32, size, offset int64, data string) error {
		_, err := m.agent.CopyFile(m.ctx(), &protocol.CopyFileRequest{
			Path: path, FileMode: mode, FileSize: size, Offset: offset, Data: []byte(data), Uid: 5, Gid: 6, DirMode: 0o755,
		})
		return err
	}
	host := filepath.Join(m.Share, "copied", "f")
	if err := copyFile(shareDir+"/copied/f", 0o100640, 6, 0, "abc"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(host); err == nil {
		t.Error("half a file is there")
	}
	if err := copyFile(shareDir+"/copied/f", 0o100640, 6, 3, "def"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(host)
	if b, _ := os.ReadFile(host); err != nil || string(b) != "abcdef" || info.Mode() != 0o640 {
		t.Errorf("got %q, %v, %v", b, info, err)
	}
	if err := copyFile(shareDir+"/copied/out", 0o120777, 0, 0, "/etc"); err != nil {
		t.Fatal(err)
	}
	for path, why := range map[string]string{
		"/etc/evil": "outside", shareDir + "/../x": "dots", shareDir + "/copied/out/evil": "a link out", shareDir: "the share itself",
	} {
		if err := copyFile(path, 0o100644, 1, 0, "x"); err == nil {
			t.Errorf("%s was written: %s", path, why)
		}
	}
}

func testDestroy(t *testing.T, m *machine) {
	m.create("last", nil, "/bin/sleep", "1000")
	m.startContainer("last")
	if _, err := m.agent.DestroySandbox(m.ctx(), &protocol.DestroySandboxRequest{}); err != nil {
		t.Errorf("destroy: %v", err)
	}
	select {
	case <-m.Done():
	case <-time.After(vmtest.Within(20 * time.Second)):
		t.Error("the machine goes on")
	}
}
