package agent_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

var containerRows = []row{
	{13, "CreateContainer", "CreateContainer", "control group, mounted storage, one process that waits and has not run the command", proveCreateContainer, with[noCreateContainer]},
	{14, "StartContainer", "StartContainer", "the command's output", proveStartContainer, with[noStartContainer]},
	{15, "StopContainer", "RemoveContainer", "no process, control group, mount or bundle is left; twice", proveStopContainer, with[noStopContainer]},
	{22, "UpdateContainer", "UpdateContainer", "files of the control group", proveUpdateContainer, with[noUpdateContainer]},
	{26, "StatsContainer", "StatsContainer", "cpu, memory, pids, io, hugetlb and network lie between what the kernel says before and after a load", proveStatsContainer, with[noStatsContainer]},
	{27, "PauseContainer", "PauseContainer", "a counter in the container stands still", provePauseContainer, with[noPauseContainer]},
	{28, "ResumeContainer", "ResumeContainer", "the counter goes on", proveResumeContainer, with[noResumeContainer]},
	{44, "OOMEvent", "GetOOMEvent", "the container whose control group counts an OOM kill", proveOOMEvent, with[noOOMEvent]},
	{53, "DiagnosticData", "GetDiagnosticData", "bytes of the file that the container wrote", proveDiagnosticData, with[noDiagnosticData]},
	{59, "Pids", "Extension.Pids (ours)", "the processes of the control group", provePids, with[noPids]},
}

// scratch is a tmpfs for a container.
func scratch(name string) *protocol.Storage {
	return &protocol.Storage{
		Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: sandboxDir + "/ephemeral/" + name,
		Options: []string{"size=1m", "noexec"},
	}
}

func proveCreateContainer(e *env) {
	id := e.create(func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{scratch(r.ContainerId)}
	}, "/bin/sh", "-c", "echo ran > /ran; sleep 1000")
	e.sees("test -d "+groupDir+"/"+id+" && echo there", "there")
	e.equal("mounted storage", e.look("grep ' "+scratch(id).MountPoint+" ' /proc/mounts | cut -d' ' -f4 | sed s/,inode64//"), "rw,noexec,relatime,size=1024k")
	e.equal("processes", len(e.pids(id)), 1)
	e.equal("command lines", e.look(hasCommand(id, "/bin/sh.*")+"; test -e "+rooted(id, "ran")+" || echo waits"), "0\nwaits")
	e.ok(e.StartContainer(e.ctx, id))
	e.sees("cat "+rooted(id, "ran"), "ran")
}

func proveStartContainer(e *env) {
	id := e.create(nil, "/bin/sh", "-c", "echo ran > /ran; sleep 1000")
	e.ok(e.StartContainer(e.ctx, id))
	e.sees("cat "+rooted(id, "ran"), "ran")
}

func proveStopContainer(e *env) {
	id := e.runWith(func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{scratch(r.ContainerId)}
	}, "/bin/sh", "-c", "sleep 1000 & sleep 1000 & wait")
	e.until("it runs", func() bool { return len(e.pids(id)) == 3 })
	e.ok(e.StopContainer(e.ctx, id))
	e.equal("processes", e.pids(id), []string{})
	left := e.look("grep -c /" + id + " /proc/self/mountinfo; ls -d " + groupDir + "/" + id + " /run/kata-containers/" + id + " 2>/dev/null; true")
	e.equal("mounts, groups, bundles", left, "0")
	e.ok(e.StopContainer(e.ctx, id))
}

func proveUpdateContainer(e *env) {
	id := e.run("/bin/sleep", "1000")
	files := "cd " + groupDir + "/" + id + "; cat memory.max cpu.max pids.max cpuset.cpus"
	e.equal("at first", e.look(files), "max\nmax 100000\nmax")
	e.ok(e.UpdateContainer(e.ctx, id, &protocol.LinuxResources{
		Memory: &protocol.LinuxMemory{Limit: 96 * mib}, CPU: &protocol.LinuxCPU{Quota: 20000, Period: 100000, Cpus: "0"}, Pids: &protocol.LinuxPids{Limit: 60},
	}))
	e.equal("after the update", e.look(files), "100663296\n20000 100000\n60\n0")
}

func proveStatsContainer(e *env) {
	// A load of each kind: it reads a disk, has memory and processes, and sends.
	_, _, device := e.plugDisk(8)
	numbers := strings.Fields(e.look("cat /sys/block/" + device + "/dev | tr : ' '"))
	major, _ := strconv.ParseInt(numbers[0], 10, 64)
	minor, _ := strconv.ParseInt(numbers[1], 10, 64)
	e.look("ip link add rowstats type dummy && ip addr add 203.0.113.1/24 dev rowstats && ip link set rowstats up")
	e.undo.Add(e.guestDo("ip link del rowstats"))
	id := e.runWith(func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Devices = []*protocol.LinuxDevice{{Path: "/dev/disk", Type: "b", Major: major, Minor: minor, FileMode: 0o600}}
		r.OCI.Linux.Resources = &protocol.LinuxResources{
			Memory:  &protocol.LinuxMemory{Limit: 64 * mib},
			Pids:    &protocol.LinuxPids{Limit: 33},
			Devices: []*protocol.LinuxDeviceCgroup{{Allow: true, Access: "rwm", Type: "b", Major: major, Minor: minor}},
		}
	}, "/bin/sh", "-c", "cat /dev/disk > /dev/null; echo read > /read; sleep 1000 & while :; do :; done")
	e.sees("cat "+rooted(id, "read"), "read")
	e.look("ping -c 1 -W 1 203.0.113.2 >/dev/null; true")

	group := groupDir + "/" + id
	script := `cd ` + group + `; awk '$1=="usage_usec"{print $2}' cpu.stat; cat memory.max pids.current pids.max; awk '/^` + numbers[0] + `:` + numbers[1] + ` /{sub("rbytes=","",$2);print $2}' io.stat; ls | grep -c '^hugetlb\.[^.]*\.current$'; awk '$1=="rowstats:"{print $10, $11}' /proc/net/dev`
	figures := func() (f []uint64) {
		for s := range strings.FieldsSeq(e.look(script)) {
			n, err := strconv.ParseUint(s, 10, 64)
			e.ok(err)
			f = append(f, n)
		}
		if len(f) != 8 {
			e.fail("figures of the guest: %v", f)
		}
		return f
	}
	first := figures()
	e.until("the load moves the guest's own figures", func() bool { return figures()[0] > first[0]+100_000 })
	before := figures()
	answer, err := e.StatsContainer(e.ctx, id)
	e.ok(err)
	after := figures()
	s := answer.GetCgroupStats()
	var read uint64
	for _, b := range s.GetBlkioStats().GetIoServiceBytesRecursive() {
		if b.GetMajor() == uint64(major) && b.GetMinor() == uint64(minor) && strings.EqualFold(b.GetOp(), "read") {
			read = b.GetValue()
		}
	}
	var bytes, packets uint64
	for _, n := range answer.GetNetworkStats() {
		if n.GetName() == "rowstats" {
			bytes, packets = n.GetTxBytes(), n.GetTxPackets()
		}
	}
	got := []uint64{
		s.GetCpuStats().GetCpuUsage().GetTotalUsage() / 1000, s.GetMemoryStats().GetUsage().GetLimit(),
		s.GetPidsStats().GetCurrent(), s.GetPidsStats().GetLimit(), read, uint64(len(s.GetHugetlbStats())), bytes, packets,
	}
	for i, what := range []string{"cpu", "memory limit", "pids", "pids limit", "bytes read", "sizes of huge pages", "bytes sent", "packets sent"} {
		if got[i] < before[i] || got[i] > after[i] {
			e.fail("%s: got %d, the guest has %d and then %d", what, got[i], before[i], after[i])
		}
	}
	if read != 8*mib || packets == 0 {
		e.fail("the load read %d bytes and sent %d packets", read, packets)
	}
	if m := s.GetMemoryStats(); m.GetUsage().GetUsage() == 0 || m.GetStats()["anon"] == 0 {
		e.fail("memory: %v", m)
	}
}

const counting = "i=0; while :; do i=$((i+1)); echo $i > /count; usleep 10000; done"

// counter starts a container that counts, and gives what reads the count.
func counter(e *env) (id string, count func() int64) {
	id = e.run("/bin/sh", "-c", counting)
	count = func() int64 { return e.number("n=$(cat " + rooted(id, "count") + " 2>/dev/null); echo ${n:-0}") }
	e.until("it counts", func() bool { return count() > 3 })
	return id, count
}

// stands says that the counter does not move.
func stands(e *env, count func() int64) bool {
	before := count()
	e.look("usleep 300000")
	return count() == before
}

func provePauseContainer(e *env) {
	id, count := counter(e)
	e.ok(e.PauseContainer(e.ctx, id))
	if !stands(e, count) {
		e.fail("it counts although it is paused")
	}
	e.ok(e.guest.client.ResumeContainer(e.ctx, id))
}

func proveResumeContainer(e *env) {
	id, count := counter(e)
	e.ok(e.guest.client.PauseContainer(e.ctx, id))
	before := count()
	e.ok(e.ResumeContainer(e.ctx, id))
	e.until("it goes on", func() bool { return count() > before+3 })
}

func proveOOMEvent(e *env) {
	id := e.runWith(func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Resources.Memory = &protocol.LinuxMemory{Limit: 24 * mib, Swap: 24 * mib}
	}, "/bin/sh", "-c", "dd if=/dev/zero of=/dev/null bs=60M count=1; sleep 1000")
	event, err := e.OOMEvent(e.ctx)
	e.ok(err)
	e.equal("container of the event", event, id)
	e.sees(`awk '$1=="oom_kill"{print $2}' `+groupDir+"/"+id+"/memory.events", "1")
}

func proveDiagnosticData(e *env) {
	id := e.run("/bin/sh", "-c", "echo last words > /dev/termination-log; echo done > /done; sleep 1000")
	e.sees("cat "+rooted(id, "done"), "done")
	b, err := e.DiagnosticData(e.ctx, "termination_log", id)
	e.ok(err)
	e.equal("termination log", string(b), "last words\n")
}

func provePids(e *env) {
	id := e.run("/bin/sh", "-c", "sleep 1000 & wait")
	e.ok(e.Exec(e.ctx, &protocol.ExecProcessRequest{ContainerId: id, ExecId: "e", Process: process("/bin/sleep", "1000")}))
	e.until("three processes", func() bool { return len(e.pids(id)) == 3 })
	list, err := e.Pids(e.ctx, id)
	e.ok(err)
	var pids, execs []string
	for _, p := range list {
		pids = append(pids, fmt.Sprint(p.GetPid()))
		execs = append(execs, p.GetExecId())
	}
	want := e.pids(id)
	slices.Sort(pids)
	slices.Sort(want)
	slices.Sort(execs)
	e.equal("processes", pids, want)
	e.equal("their exec ids", execs, []string{"", id, "e"})
}

// guestDo is a script in the guest for the end of a proof.
func (e *env) guestDo(script string) func() error {
	g := e.guest
	return func() error {
		ctx, cancel := e.later()
		defer cancel()
		_, err := g.look(ctx, script)
		return err
	}
}
