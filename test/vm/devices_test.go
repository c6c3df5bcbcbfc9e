package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

const guestRoot = "/run/kata-containers/"

// TestVMDevices is about what the agent does with devices, volumes and plugged
// resources. One machine serves all parts, which leave it as it was.
func TestVMDevices(t *testing.T) {
	m := boot(t, func(s *hypervisor.Spec) {
		s.VCPUs, s.MaxVCPUs, s.MemorySlots = 2, 2, 2
		s.KernelParams = []string{"agent.hotplug_timeout=5", "memhp_default_state=offline", "vfio.enable_unsafe_noiommu_mode=1"}
		share := s.Shares[0].Dir
		if err := unix.Mount(share, share, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(share, unix.MNT_DETACH) })
		if err := unix.Mount("", share, "", unix.MS_SHARED, ""); err != nil {
			t.Fatal(err)
		}
	})
	m.writeHooks()
	m.createSandbox(func(r *protocol.CreateSandboxRequest) { r.GuestHookPath = shareDir + "/hooks" })
	m.lookout()
	// Its controller stays.
	if _, err := m.PlugSCSIDisk(m.ctx(), image(t, "first", "", 1)); err != nil {
		t.Fatal(err)
	}
	if err := m.UnplugDisk(m.ctx(), "first"); err != nil {
		t.Fatal(err)
	}
	m.seen("ls -d /guest/sys/block/sda 2>/dev/null", "")
	for _, part := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"details", guestDetails},
		{"devices", containerDevices},
		{"vfio", vfioDevices},
		{"awaited disk", awaitedDisk},
		{"failed container", failedContainer},
		{"ext4", func(t *testing.T, m *machine) { volume(t, m, "ext4", 16, 48, 32) }},
		{"xfs", func(t *testing.T, m *machine) { volume(t, m, "xfs", 320, 640, 480) }},
		{"swap", swap},
		{"cpus", onlineCPUs},
		{"memory", onlineMemory},
		{"huge pages", hugePages},
		{"ephemeral", resizeEphemeral},
		{"watchable bind", watchableBind},
		{"shared mount", sharedMount},
		{"termination log", terminationLog},
		{"hooks", guestHooks},
		{"stale mounts", staleMounts},
	} {
		t.Run(part.name, func(t *testing.T) {
			m := m.on(t)
			before := m.guestMounts()
			part.test(t, m)
			if diff := cmp.Diff(before, m.guestMounts()); diff != "" {
				t.Errorf("mounts of the guest (-before +now):\n%s", diff)
			}
		})
	}
	m.remove("look")
}

// guestMounts are the mounts of the agent, which are those of process 1.
func (m *machine) guestMounts() []string {
	m.tb.Helper()
	table := m.look("grep kata-containers /guest/proc/1/mountinfo")
	var points []string
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], guestRoot) {
			points = append(points, f[4])
		}
	}
	if len(points) == 0 {
		m.tb.Fatalf("no mounts in %q", table)
	}
	slices.Sort(points)
	return points
}

func onHost(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}

func guestDetails(t *testing.T, m *machine) {
	resp, err := m.agent.GetGuestDetails(m.ctx(), &protocol.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true})
	if err != nil {
		t.Fatal(err)
	}
	d := resp.GetAgentDetails()
	if diff := cmp.Diff([]string{"blk", "mmioblk", "nvdimm", "scsi", "vfio-pci", "vfio-pci-gk"}, d.GetDeviceHandlers()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	want := []string{"bind", "blk", "ephemeral", "local", "mmioblk", "nvdimm", "overlayfs", "scsi", "virtio-fs", "watchable-bind"}
	if diff := cmp.Diff(want, d.GetStorageHandlers()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := fmt.Sprintf("%x", resp.GetMemBlockSizeBytes()); got != m.look("cat /guest/sys/devices/system/memory/block_size_bytes") {
		t.Errorf("memory blocks of %s", got)
	}
	probe := m.look("ls /guest/sys/devices/system/memory | grep -c probe") == "1"
	if resp.GetSupportMemHotplugProbe() != probe {
		t.Errorf("memory probe %v", !probe)
	}
	_, err = m.agent.MemHotplugByProbe(m.ctx(), &protocol.MemHotplugByProbeRequest{MemHotplugProbeAddr: []uint64{1}})
	if probe {
		wantClass(t, "probe in the middle of a block", err, errdefs.ErrInvalidArgument)
	} else {
		wantClass(t, "probe without a probe", err, errdefs.ErrFailedPrecondition)
	}
}

func deviceNode(path string, major, minor int64) *protocol.LinuxDevice {
	return &protocol.LinuxDevice{Path: path, Type: "b", Major: major, Minor: minor, FileMode: 0o660}
}

// A container sees disks under the names of the host, with the guest's numbers.
func containerDevices(t *testing.T, m *machine) {
	pci, err := m.PlugDisk(m.ctx(), image(t, "blk", "by pci path", 1))
	if err != nil {
		t.Fatal(err)
	}
	scsi, err := m.PlugSCSIDisk(m.ctx(), image(t, "scsi", "by scsi address", 1))
	if err != nil {
		t.Fatal(err)
	}
	m.create("dev", func(r *protocol.CreateContainerRequest) {
		// The host's numbers of one are the guest's of the other.
		r.OCI.Linux.Devices = []*protocol.LinuxDevice{deviceNode("/dev/one", 8, 0), deviceNode("/dev/two", 254, 0), deviceNode("/dev/three", 8, 99)}
		r.OCI.Linux.Resources.Devices = []*protocol.LinuxDeviceCgroup{
			{Allow: false, Access: "rwm"},
			{Allow: true, Type: "b", Major: 8, Minor: 0, Access: "r"},
			{Allow: true, Type: "b", Major: 254, Minor: 0, Access: "rw"},
			{Allow: true, Type: "b", Major: 8, Minor: 99, Access: "r"},
		}
		r.Devices = []*protocol.Device{
			{Type: "blk", Id: pci, ContainerPath: "/dev/one"},
			{Type: "scsi", Id: scsi, ContainerPath: "/dev/two"},
			{Type: "mmioblk", VmPath: "/dev/vda", ContainerPath: "/dev/three"},
		}
	}, "/bin/sleep", "1000")
	m.startContainer("dev")
	got := m.inContainer("dev", "/bin/sh", "-c", "head -c 11 /dev/one; echo; head -c 15 /dev/two; echo; head -c 11 /dev/three; echo; "+
		"echo x 2>&1 >/dev/one | busybox sed 's/.*: //'; echo y 2>&1 >/dev/two; busybox stat -c %t:%T /dev/two")
	want := "by pci path\nby scsi address\nby pci path\nOperation not permitted\n" + m.look("busybox stat -c %t:%T /guest/dev/sda")
	if diff := cmp.Diff(want, strings.ReplaceAll(got, "can't create /dev/one: ", "")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	m.remove("dev")
	for _, id := range []string{"blk", "scsi"} {
		if err := m.UnplugDisk(m.ctx(), id); err != nil {
			t.Fatal(err)
		}
	}
	err = m.tryCreate("dev", func(r *protocol.CreateContainerRequest) {
		r.Devices = []*protocol.Device{{Type: "blk", Id: "02/zz", ContainerPath: "/dev/one"}}
	}, "/bin/true")
	wantClass(t, "a path that is none", err, errdefs.ErrInvalidArgument)
}

// With a driver of the guest's a PCI device is waited for; for a process it is
// given to vfio-pci, if the kernel lets that have it.
func vfioDevices(t *testing.T, m *machine) {
	pci, err := m.PlugPCI(m.ctx(), hypervisor.PCIDevice{ID: "edu", Driver: "edu"})
	if err != nil {
		t.Fatal(err)
	}
	address := m.look("busybox basename " + guestPCI(pci))
	out, _, _ := m.run("gk", func(r *protocol.CreateContainerRequest) {
		r.OCI.Process.Env = append(r.OCI.Process.Env, "PCIDEVICE_X=0000:af:00.0")
		r.Devices = []*protocol.Device{{Type: "vfio-pci-gk", Id: "7", Options: []string{"0000:af:00.0=" + pci}}}
	}, "/bin/sh", "-c", "echo $PCIDEVICE_X")
	if strings.TrimSpace(out) != address {
		t.Errorf("environment has %q, the guest %q", out, address)
	}
	err = m.tryCreate("vfio", func(r *protocol.CreateContainerRequest) {
		r.OCI.Linux.Devices = []*protocol.LinuxDevice{{Path: "/dev/vfio/9", Type: "c", Major: 240, Minor: 9, FileMode: 0o600}}
		r.Devices = []*protocol.Device{{Type: "vfio-pci", Id: "9", ContainerPath: "/dev/vfio/9", Options: []string{"0000:af:00.0=" + pci}}}
	}, "/bin/sleep", "1000")
	const driver = "/driver 2>/dev/null | busybox xargs -r busybox basename"
	if m.look("cat /guest/sys/module/vfio/parameters/enable_unsafe_noiommu_mode 2>/dev/null") == "Y" {
		if err != nil {
			t.Fatal(err)
		}
		if got := m.look("readlink " + guestPCI(pci) + driver); got != "vfio-pci" {
			t.Errorf("driver %q", got)
		}
		m.startContainer("vfio")
		if got := m.inContainer("vfio", "/bin/sh", "-c", "busybox stat -c %t:%T /dev/vfio/*"); got != m.look("busybox stat -c %t:%T /guest/dev/vfio/noiommu-*") {
			t.Errorf("node %q", got)
		}
		m.remove("vfio")
	} else {
		wantClass(t, "vfio without an iommu", err, errdefs.ErrFailedPrecondition)
		t.Log(err)
	}
	if got := m.look("readlink " + guestPCI(pci) + driver); got != "" {
		t.Errorf("driver %q afterwards", got)
	}
	if err := m.UnplugPCI(m.ctx(), "edu"); err != nil {
		t.Fatal(err)
	}
}

// A container waits for its disk.
func awaitedDisk(t *testing.T, m *machine) {
	disk := image(t, "late", "", 16)
	onHost(t, "mkfs.ext4", "-q", "-F", disk.Path)
	pci, err := m.PlugDisk(m.ctx(), disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.UnplugDisk(m.ctx(), disk.ID); err != nil {
		t.Fatal(err)
	}
	m.rootfs("late")
	created := make(chan error, 1)
	start := time.Now()
	go func() {
		req := &protocol.CreateContainerRequest{ContainerId: "late", ExecId: "late", OCI: spec("late", "/bin/sleep", "1000")}
		req.Storages = []*protocol.Storage{{Driver: "blk", Source: pci, Fstype: "ext4", MountPoint: guestRoot + "late"}}
		_, err := m.agent.CreateContainer(m.ctx(), req)
		created <- err
	}()
	time.Sleep(300 * time.Millisecond) // so that it waits, most probably
	if again, err := m.PlugDisk(m.ctx(), disk); err != nil || again != pci {
		t.Fatal(again, err)
	}
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	t.Logf("created after %v", time.Since(start))
	if !slices.Contains(m.guestMounts(), guestRoot+"late") {
		t.Error("not mounted")
	}
	m.remove("late")
	if err := m.UnplugDisk(m.ctx(), disk.ID); err != nil {
		t.Fatal(err)
	}
}

// A container whose second disk never comes gives the first one back, and says
// what it waited for, and not for longer than the host wants.
func failedContainer(t *testing.T, m *machine) {
	disk := image(t, "good", "", 16)
	onHost(t, "mkfs.ext4", "-q", "-F", disk.Path)
	pci, err := m.PlugDisk(m.ctx(), disk)
	if err != nil {
		t.Fatal(err)
	}
	before := m.guestMounts()
	start := time.Now()
	err = m.tryCreate("failed", func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{
			{Driver: "blk", Source: pci, Fstype: "ext4", MountPoint: guestRoot + "good"},
			{Driver: "blk", Source: "02/1e", Fstype: "ext4", MountPoint: guestRoot + "bad"},
		}
	}, "/bin/true")
	if err == nil || !strings.Contains(err.Error(), "disk at PCI path 02/1e") {
		t.Errorf("got %v", err)
	}
	if d := time.Since(start); d < 5*time.Second || d > 30*time.Second {
		t.Errorf("waited for %v", d)
	}
	if diff := cmp.Diff(before, m.guestMounts()); diff != "" {
		t.Errorf("(-before +now):\n%s", diff)
	}
	if got := m.look("ls " + "/guest/sys/fs/cgroup/vmshim | grep failed"); got != "" {
		t.Errorf("control group %s", got)
	}
	// And the device can go.
	if err := m.UnplugDisk(m.ctx(), disk.ID); err != nil {
		t.Fatal(err)
	}
}

// A volume of a container grows under it, to a size and to the end of its disk.
func volume(t *testing.T, m *machine, fstype string, mib, disk, size uint64) {
	img := image(t, fstype, "", int64(mib))
	mkfs := map[string][]string{"ext4": {"-q", "-F"}, "xfs": {"-q"}}[fstype]
	onHost(t, "mkfs."+fstype, append(mkfs, img.Path)...)
	pci, err := m.PlugDisk(m.ctx(), img)
	if err != nil {
		t.Fatal(err)
	}
	id, at := "vol-"+fstype, guestRoot+"sandbox/storage/"+fstype
	m.create(id, func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{{
			Driver: "blk", Source: pci, Fstype: fstype, MountPoint: at,
			FsGroup: &protocol.FSGroup{GroupId: 77},
		}}
		r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/vol", Source: at, Type: "bind", Options: []string{"rbind"}})
	}, "/bin/sleep", "1000")
	m.startContainer(id)
	if got := m.inContainer(id, "/bin/sh", "-c", "busybox stat -c '%A %g' /vol; echo kept > /vol/f"); got != "drwxrwsr-x 77" {
		t.Errorf("root of the volume: %s", got)
	}
	stats := func() (bytes, inodes *protocol.VolumeUsage) {
		t.Helper()
		resp, err := m.agent.GetVolumeStats(m.ctx(), &protocol.VolumeStatsRequest{VolumeGuestPath: at})
		if err != nil || len(resp.GetUsage()) != 2 {
			t.Fatal(resp, err)
		}
		return resp.GetUsage()[0], resp.GetUsage()[1]
	}
	check := func(least, most uint64) {
		t.Helper()
		bytes, inodes := stats()
		var total, free, available, block, files, filesFree uint64
		out := m.inContainer(id, "/bin/sh", "-c", "busybox stat -f -c '%b %f %a %S %c %d' /vol")
		if _, err := fmt.Sscan(out, &total, &free, &available, &block, &files, &filesFree); err != nil {
			t.Fatal(out, err)
		}
		want := []uint64{total * block, (total - free) * block, available * block, files, files - filesFree, filesFree}
		got := []uint64{bytes.GetTotal(), bytes.GetUsed(), bytes.GetAvailable(), inodes.GetTotal(), inodes.GetUsed(), inodes.GetAvailable()}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("stats (-guest +reply):\n%s", diff)
		}
		if fstype == "ext4" && free <= available {
			t.Error("nothing is kept for root, so that available proves nothing")
		}
		if n := total * block >> 20; n < least || n > most {
			t.Errorf("%d MiB, want %d to %d", n, least, most)
		}
	}
	resize := func(size uint64) error {
		_, err := m.agent.ResizeVolume(m.ctx(), &protocol.ResizeVolumeRequest{VolumeGuestPath: at, Size: size << 20})
		return err
	}
	check(mib*3/4, mib)
	if err := os.Truncate(img.Path, int64(disk)<<20); err != nil {
		t.Fatal(err)
	}
	// The disk grows while the agent waits for that.
	grown := make(chan error, 1)
	go func() { grown <- resize(size) }()
	if _, err := m.GrowDisk(m.ctx(), fstype); err != nil {
		t.Fatal(err)
	}
	if err := <-grown; err != nil {
		t.Fatal(err)
	}
	check(size*3/4, size)
	if err := resize(0); err != nil {
		t.Error(err)
	}
	check(disk*3/4, disk)
	if err := resize(mib); err != nil { // smaller is none
		t.Error(err)
	}
	if err := resize(2 * disk); err == nil || !strings.Contains(err.Error(), "wait for disk of") {
		t.Errorf("larger than the disk: %v", err)
	}
	check(disk*3/4, disk)
	if got := m.inContainer(id, "/bin/cat", "/vol/f"); got != "kept" {
		t.Errorf("the file has %q", got)
	}
	m.remove(id)
	if err := m.UnplugDisk(m.ctx(), fstype); err != nil {
		t.Fatal(err)
	}
}

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

func resizeEphemeral(t *testing.T, m *machine) {
	const shm = guestRoot + "sandbox/shm"
	size := func() string { return m.look("busybox stat -f -c %b /dev/shm; grep ' /dev/shm ' /proc/mounts") }
	before := size()
	_, err := m.agent.UpdateEphemeralMounts(m.ctx(), &protocol.UpdateEphemeralMountsRequest{Storages: []*protocol.Storage{
		{Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: shm, Options: []string{"size=134217728"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := strings.NewReplacer("16384\n", "32768\n", "size=65536k", "size=131072k").Replace(before)
	if diff := cmp.Diff(want, size()); diff != "" || want == before {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A container that watches a volume of Kubernetes' kind is told of a change.
func watchableBind(t *testing.T, m *machine) {
	volume := filepath.Join(m.Share, "watchable-source")
	generation := func(n int) {
		t.Helper()
		dir := fmt.Sprintf("..%d", n)
		if err := os.MkdirAll(filepath.Join(volume, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(volume, dir, "key"), fmt.Appendf(nil, "generation %d", n), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(dir, volume+"/..tmp"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(volume+"/..tmp", volume+"/..data"); err != nil {
			t.Fatal(err)
		}
		_ = os.Symlink("..data/key", volume+"/key")
		_ = os.RemoveAll(filepath.Join(volume, fmt.Sprintf("..%d", n-1)))
	}
	generation(1)
	at := guestRoot + "watched/volume"
	m.create("watch", func(r *protocol.CreateContainerRequest) {
		r.Storages = []*protocol.Storage{{Driver: "watchable-bind", Source: shareDir + "/watchable-source", Fstype: "bind", MountPoint: at, Options: []string{"ro"}}}
		r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/watched", Source: at, Type: "bind", Options: []string{"rbind", "ro"}})
		install(t, buildProgram(t, "watchdir"), m.hostFile("watch", "bin/watchdir"))
	}, "/bin/sh", "-c", "exec watchdir /watched > /events")
	m.startContainer("watch")
	if got := m.inContainer("watch", "/bin/cat", "/watched/key"); got != "generation 1" {
		t.Errorf("at first %q", got)
	}
	events := func() string {
		b, _ := os.ReadFile(m.hostFile("watch", "events"))
		return string(b)
	}
	m.eventually("it watches", func() bool { return events() == "watching\n" })
	generation(2)
	m.eventually("it is told", func() bool { return strings.Contains(events(), "moved ..data\n") })
	if got := m.inContainer("watch", "/bin/cat", "/watched/key"); got != "generation 2" {
		t.Errorf("then %q", got)
	}
	m.remove("watch")
}

// A mount of one container appears in another.
func sharedMount(t *testing.T, m *machine) {
	m.create("giver", func(r *protocol.CreateContainerRequest) {
		r.OCI.Annotations = map[string]string{"io.kubernetes.cri.container-name": "sidecar"}
		r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/given", Source: "tmpfs", Type: "tmpfs"})
	}, "/bin/sh", "-c", "echo hello > /given/f; sleep 1000")
	mount := &protocol.SharedMount{Name: "x", SrcCtr: "sidecar", SrcPath: "/given", DstCtr: "taker", DstPath: "/taken"}
	m.startContainer("giver")
	m.create("taker", func(r *protocol.CreateContainerRequest) { r.SharedMounts = []*protocol.SharedMount{mount} }, "/bin/sleep", "1000")
	m.startContainer("taker")
	if got := m.inContainer("taker", "/bin/sh", "-c", "cat /taken/f; grep -c ' /taken tmpfs ' /proc/mounts"); got != "hello\n1" {
		t.Errorf("got %q", got)
	}
	m.remove("taker")
	m.remove("giver")
	err := m.tryCreate("taker", func(r *protocol.CreateContainerRequest) { r.SharedMounts = []*protocol.SharedMount{mount} }, "/bin/true")
	wantClass(t, "a mount of nobody", err, errdefs.ErrNotFound)
}

func terminationLog(t *testing.T, m *machine) {
	get := func(id string) (string, error) {
		resp, err := m.agent.GetDiagnosticData(m.ctx(), &protocol.GetDiagnosticDataRequest{LogType: "termination_log", ContainerId: id})
		return string(resp.GetData()), err
	}
	m.create("term", nil, "/bin/sh", "-c", "echo live > /dev/termination-log; sleep 1000")
	m.startContainer("term")
	m.eventually("the log of a running container", func() bool { got, err := get("term"); return err == nil && got == "live\n" })
	m.remove("term")
	_, err := get("term")
	wantClass(t, "a container that is gone", err, errdefs.ErrNotFound)

	m.create("term", func(r *protocol.CreateContainerRequest) {
		r.OCI.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/var/why"}
	}, "/bin/sh", "-c", "busybox mkdir /var; echo because > /var/why; exit 3")
	m.startContainer("term")
	m.wait("term", "term")
	if got, err := get("term"); got != "because\n" || err != nil {
		t.Errorf("of an ended one: %q, %v", got, err)
	}
	m.remove("term")
}

// writeHooks puts programs for every stage into the share: each writes what it is
// told to a file.
func (m *machine) writeHooks() {
	m.tb.Helper()
	write := func(name, text string) {
		path := filepath.Join(m.Share, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			m.tb.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			m.tb.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		m.tb.Fatal(err)
	}
	write("busybox", string(busybox))
	write("hooklog", "")
	for _, stage := range []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"} {
		write("hooks/"+stage+"/1", "#!"+shareDir+"/busybox sh\nread -r state\necho "+stage+" $state >> "+shareDir+"/hooklog\n")
	}
}

func guestHooks(t *testing.T, m *machine) {
	log := filepath.Join(m.Share, "hooklog")
	stages := func() string {
		t.Helper()
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for line := range strings.Lines(string(b)) {
			stage, state, _ := strings.Cut(line, " ")
			if !strings.Contains(state, `id:hooked`) && !strings.Contains(state, `"id":"hooked"`) {
				t.Errorf("%s was told %s", stage, state)
			}
			list = append(list, stage)
		}
		if err := os.Truncate(log, 0); err != nil {
			t.Fatal(err)
		}
		return strings.Join(list, " ")
	}
	if err := os.Truncate(log, 0); err != nil {
		t.Fatal(err)
	}
	m.create("hooked", nil, "/bin/sleep", "1000")
	if got := stages(); got != "prestart createRuntime createContainer" {
		t.Errorf("at create: %s", got)
	}
	m.startContainer("hooked")
	if got := stages(); got != "startContainer poststart" {
		t.Errorf("at start: %s", got)
	}
	m.remove("hooked")
	if got := stages(); got != "poststop" {
		t.Errorf("at the end: %s", got)
	}
}

// A mount below the share that the host has taken away goes from the guest, too.
func staleMounts(t *testing.T, m *machine) {
	for _, name := range []string{"stale", "live"} {
		dir := filepath.Join(m.Share, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		if err := os.WriteFile(dir+"/f", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		// The agent sees it.
		if _, err := m.agent.GetVolumeStats(m.ctx(), &protocol.VolumeStatsRequest{VolumeGuestPath: shareDir + "/" + name + "/f"}); err != nil {
			t.Fatal(err)
		}
	}
	stale, live := shareDir+"/stale", shareDir+"/live"
	if points := m.guestMounts(); !slices.Contains(points, stale) || !slices.Contains(points, live) {
		t.Fatalf("the guest has no submounts: %v", points)
	}
	call := func() {
		t.Helper()
		if _, err := m.agent.RemoveStaleVirtiofsShareMounts(m.ctx(), &protocol.RemoveStaleVirtiofsShareMountsRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Unmount(filepath.Join(m.Share, "stale"), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	call()
	if points := m.guestMounts(); slices.Contains(points, stale) || !slices.Contains(points, live) {
		t.Errorf("now: %v", points)
	}
	if err := unix.Unmount(filepath.Join(m.Share, "live"), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	call()
}
