package vm

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
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
		{"other disks", otherDisks},
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
	if d := time.Since(start); d < 5*time.Second || d > vmtest.Within(30*time.Second) {
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
