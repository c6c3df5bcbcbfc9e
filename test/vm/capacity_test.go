package vm

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func swap(t *testing.T, m *machine) {
	var paths []string
	for _, id := range []string{"swap1", "swap2", "none"} {
		img := image(t, id, "", 8)
		if id != "none" {
			onHost(t, "mkswap", img.Path)
		}
		pci, err := m.PlugDisk(m.ctx(), img)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, pci)
	}
	numbers := func(path string) []uint32 {
		var a, b uint32
		if _, err := fmt.Sscanf(path, "%02x/%02x", &a, &b); err != nil {
			t.Fatal(err)
		}
		return []uint32{a, b}
	}
	m.seen("ls "+guestPCI(paths[2])+"/virtio*/block | wc -l", "1")
	name := m.look("ls " + guestPCI(paths[1]) + "/virtio*/block")
	if _, err := m.agent.AddSwap(m.ctx(), &protocol.AddSwapRequest{PCIPath: numbers(paths[0])}); err != nil {
		t.Error(err)
	}
	if _, err := m.agent.AddSwapPath(m.ctx(), &protocol.AddSwapPathRequest{Path: "/dev/" + name}); err != nil {
		t.Error(err)
	}
	if got := m.look("grep -c partition /guest/proc/swaps"); got != "2" {
		t.Errorf("%s swaps", got)
	}
	_, err := m.agent.AddSwap(m.ctx(), &protocol.AddSwapRequest{PCIPath: numbers(paths[0])})
	wantClass(t, "swap twice", err, errdefs.ErrAlreadyExists)
	_, err = m.agent.AddSwap(m.ctx(), &protocol.AddSwapRequest{PCIPath: numbers(paths[2])})
	wantClass(t, "a disk without swap", err, errdefs.ErrInvalidArgument)
	_, err = m.agent.AddSwapPath(m.ctx(), &protocol.AddSwapPathRequest{Path: "/etc/passwd"})
	wantClass(t, "a file", err, errdefs.ErrInvalidArgument)
	if err := m.UnplugDisk(m.ctx(), "none"); err != nil {
		t.Error(err)
	}
}

// CPUs that came offline are used, also by containers that were meant for more
// than there were; and a container can be killed while the agent waits for one.
func onlineCPUs(t *testing.T, m *machine) {
	m.look("echo 0 > /guest/sys/devices/system/cpu/cpu1/online")
	m.seen("grep -c ^processor /proc/cpuinfo", "1")
	m.create("wide", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Resources.CPU = &protocol.LinuxCPU{Cpus: "0-7"}
	}, "/bin/sleep", "1000")
	m.startContainer("wide")
	cpus := func() string { return m.inContainer("wide", "/bin/cat", "/sys/fs/cgroup/cpuset.cpus") }
	if got := cpus(); got != "0" {
		t.Errorf("cpus %q", got)
	}
	online := func(n uint32) error {
		_, err := m.agent.OnlineCPUMem(m.ctx(), &protocol.OnlineCPUMemRequest{Wait: true, NbCpus: n, CpuOnly: true})
		return err
	}
	if err := online(1); err != nil {
		t.Fatal(err)
	}
	m.seen("grep -c ^processor /proc/cpuinfo", "2")
	if got := cpus(); got != "0-1" {
		t.Errorf("cpus %q", got)
	}
	waiting := make(chan error, 1)
	start := time.Now()
	go func() { waiting <- online(1) }()
	time.Sleep(200 * time.Millisecond)
	m.signal("wide", "wide", 9, false)
	if got := m.wait("wide", "wide").GetStatus(); got != 137 {
		t.Errorf("status %d", got)
	}
	if d := time.Since(start); d > 4*time.Second {
		t.Errorf("killed after %v", d)
	}
	if err := <-waiting; err == nil || !strings.Contains(err.Error(), "0 of 1 CPUs") {
		t.Errorf("a CPU that never comes: %v", err)
	}
	m.remove("wide")
}

func onlineMemory(t *testing.T, m *machine) {
	total := func() (kib int) {
		if _, err := fmt.Sscan(m.look("grep MemTotal /proc/meminfo | busybox awk '{print $2}'"), &kib); err != nil {
			t.Fatal(err)
		}
		return kib
	}
	before := total()
	if _, err := m.ResizeMemory(m.ctx(), 256+256); err != nil {
		t.Fatal(err)
	}
	if _, err := m.agent.OnlineCPUMem(m.ctx(), &protocol.OnlineCPUMemRequest{Wait: true}); err != nil {
		t.Fatal(err)
	}
	if now := total(); now < before+240<<10 {
		t.Errorf("%d KiB, %d before", now, before)
	}
	if got := m.look("cat /guest/sys/devices/system/memory/memory*/state | grep -c offline"); got != "0" {
		t.Errorf("%s blocks offline", got)
	}
	// Movable: it can be taken away again.
	if _, err := m.ResizeMemory(m.ctx(), 256); err != nil {
		t.Error(err)
	}
	m.seen("ls -d /guest/sys/devices/system/memory/memory* | wc -l", "2")
}

func hugePages(t *testing.T, m *machine) {
	const total = "grep HugePages_Total /proc/meminfo | busybox awk '{print $2}'"
	at := guestRoot + "sandbox/ephemeral/huge"
	m.create("huge", func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{{Driver: "ephemeral", Source: "nodev", Fstype: "hugetlbfs", MountPoint: at, Options: []string{"pagesize=2Mi", "size=4194304"}}}
		r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/huge", Source: at, Type: "bind", Options: []string{"rbind"}})
	}, "/bin/sleep", "1000")
	m.startContainer("huge")
	if got := m.look(total); got != "2" {
		t.Errorf("%s pages", got)
	}
	if got := m.inContainer("huge", "/bin/sh", "-c", "busybox stat -f -c '%S %b' /huge"); got != "2097152 2" {
		t.Errorf("file system of %s", got)
	}
	m.remove("huge")
	if got := m.look(total); got != "0" {
		t.Errorf("%s pages afterwards", got)
	}
}
