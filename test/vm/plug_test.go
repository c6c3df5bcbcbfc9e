package vm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// TestVMPlug adds devices to a running guest and removes them. One machine
// serves all parts, which leave it as it was.
func TestVMPlug(t *testing.T) {
	// One that goes on from a template has its vsock and its share in slots.
	m := connect(t, vmtest.Boot(t))
	m.createSandbox()
	m.lookout()
	// The controller comes with the first SCSI disk, and stays.
	var jobs sync.WaitGroup
	for _, id := range []string{"first", "second"} {
		disk := image(t, id, "", 1)
		jobs.Go(func() {
			if _, err := m.PlugSCSIDisk(m.ctx(), disk); err != nil {
				t.Error(err)
			}
		})
	}
	jobs.Wait()
	m.seen("ls -d /guest/sys/bus/scsi/devices/*:0:*:0/block/sd? | wc -l", "2")
	for _, id := range []string{"first", "second"} {
		if err := m.UnplugDisk(m.ctx(), id); err != nil {
			t.Fatal(err)
		}
	}
	m.seen("ls -d /guest/sys/block/sd? 2>/dev/null", "")
	if p := m.Plugged(); len(p) != 1 || p[0].Kind != hypervisor.KindSCSIController {
		t.Errorf("plugged: %v", p)
	}
	before := m.look("cd /guest/sys; ls bus/pci/devices block")
	for _, part := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"disk", plugDisk},
		{"scsi disk", plugSCSI},
		{"nic", plugNIC},
		{"share", plugShare},
		{"pci device", plugPCI},
		{"cpu", plugCPU},
		{"memory", plugMemory},
		{"every slot", plugEverySlot},
	} {
		t.Run(part.name, func(t *testing.T) {
			own, qemus := m.descriptors()
			part.test(t, m.on(t))
			now, qemuNow := m.descriptors()
			if diff := cmp.Diff(own, now); diff != "" {
				t.Errorf("own descriptors (-before +now):\n%s", diff)
			}
			if diff := cmp.Diff(qemus, qemuNow); diff != "" {
				t.Errorf("qemu's descriptors (-before +now):\n%s", diff)
			}
		})
	}
	m.seen("cd /guest/sys; ls bus/pci/devices block", before)
}

// lookout starts a container that sees the guest's own /sys and /dev.
func (m *machine) lookout() {
	m.tb.Helper()
	m.create("look", func(r *protocol.CreateContainerRequest) {
		r.OCI.Mounts = append(r.OCI.Mounts,
			&protocol.Mount{Destination: "/guest/sys", Source: "/sys", Type: "bind", Options: []string{"rbind"}},
			&protocol.Mount{Destination: "/guest/proc", Source: "/proc", Type: "bind", Options: []string{"rbind"}},
			&protocol.Mount{Destination: "/guest/dev", Source: "/dev", Type: "bind", Options: []string{"rbind"}},
		)
		r.OCI.Linux.Resources.Devices = []*protocol.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}, "/bin/sleep", "100000")
	m.startContainer("look")
}

// look runs a script in the container that sees the guest's devices.
func (m *machine) look(script string) string {
	m.tb.Helper()
	return m.inContainer("look", "/bin/sh", "-c", script)
}

// seen waits until the guest's answer to the script is that. A driver that is
// loaded first takes an emulated guest its time.
func (m *machine) seen(script, want string) {
	m.tb.Helper()
	var got string
	for deadline := time.Now().Add(vmtest.Timeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got = m.look(script); got == want {
			return
		}
	}
	m.tb.Errorf("the guest has %q, want %q: %s", got, want, script)
}

// descriptors lists the open files of the test and of QEMU, without those of
// CPUs: KVM can't take one away, and QEMU keeps it for the next.
func (m *machine) descriptors() (own, qemus []string) {
	m.tb.Helper()
	list := func(pid string) (files []string) {
		dir := "/proc/" + pid + "/fd/"
		entries, err := os.ReadDir(dir)
		if err != nil {
			m.tb.Fatal(err)
		}
		for _, e := range entries {
			target, err := os.Readlink(dir + e.Name())
			if err != nil || strings.HasPrefix(target, "/proc/") || // the directory itself
				strings.HasPrefix(target, "anon_inode:kvm-vcpu") {
				continue
			}
			files = append(files, strings.TrimRight(target, "0123456789[]")) // socket:[4711]
		}
		slices.Sort(files)
		return files
	}
	for _, p := range m.Processes() {
		if p.Role == "qemu" {
			qemus = list(fmt.Sprint(p.PID))
		}
	}
	return list("self"), qemus
}

// Modules of memory for guests without virtio-mem. Online as movable they go
// again; the guest refuses to give back one that it can't empty, and lives on.
func TestVMPlugModules(t *testing.T) {
	m := boot(t, func(s *hypervisor.Spec) {
		s.MemorySlots = 2
		s.KernelParams = []string{"memhp_default_state=offline"}
	})
	m.createSandbox()
	m.lookout()
	const blocks = "ls -d /guest/sys/devices/system/memory/memory* | wc -l"
	before := m.look(blocks)
	got, err := m.ResizeMemory(m.ctx(), 256+128)
	if err != nil || got.MiB != 384 || len(got.Modules) != 1 || got.Modules[0].MiB != 128 {
		t.Fatalf("grown to %+v, %v", got, err)
	}
	if got, err = m.ResizeMemory(m.ctx(), 900); err != nil || got.MiB != 1024 || len(got.Modules) != 2 {
		t.Fatalf("grown to %+v, %v", got, err)
	}
	m.seen(fmt.Sprintf("test $(%s) = $((%s+6)) && echo six more", blocks, before), "six more")
	first := got.Modules[0].Address / (128 << 20)
	if first == 0 {
		t.Fatalf("no addresses in %+v", got)
	}
	state := fmt.Sprintf("/guest/sys/devices/system/memory/memory%d/state", first)
	m.look("echo online_movable > " + state)
	m.seen("cat "+state, "online")
	// What was online already goes last.
	if got, err = m.ResizeMemory(m.ctx(), 384); err != nil || got.MiB != 384 || len(got.Modules) != 1 {
		t.Fatalf("shrunk to %+v, %v", got, err)
	}
	if got, err = m.ResizeMemory(m.ctx(), 256); err != nil || got.MiB != 256 {
		t.Errorf("shrunk to %+v, %v", got, err)
	}
	m.seen(blocks, before)
}

// A machine ends with the daemon of a share that came later, too.
func TestVMPlugShareDies(t *testing.T) {
	m := boot(t)
	if _, err := m.PlugShare(m.ctx(), hypervisor.Share{Tag: "later", Dir: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	processes := m.Processes()
	last := processes[len(processes)-1]
	if err := unix.Kill(last.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	lacks(t, ended(t, m.Machine, 5*time.Second), "virtiofsd ended: signal: killed")
	if _, err := m.PlugShare(m.ctx(), hypervisor.Share{Tag: "other", Dir: t.TempDir()}); !errdefs.IsUnavailable(err) {
		t.Errorf("plugged into a machine that is gone: %v", err)
	}
}

// A kill waits for no guest, nor for a call that does.
func TestVMKillBesidePlug(t *testing.T) {
	m := boot(t)
	disk := image(t, "disk", "", 1)
	if _, err := m.PlugDisk(m.ctx(), disk); err != nil {
		t.Fatal(err)
	}
	signalRole(t, m.Machine, "qemu", unix.SIGSTOP)
	var jobs sync.WaitGroup
	calls := []func() error{
		func() error { return m.UnplugDisk(m.ctx(), "disk") },
		func() error { _, err := m.PlugDisk(m.ctx(), image(t, "other", "", 1)); return err },
		func() error { _, err := m.PlugShare(m.ctx(), hypervisor.Share{Tag: "x", Dir: t.TempDir()}); return err },
		func() error { _, err := m.ResizeMemory(m.ctx(), 512); return err },
		func() error { _, err := m.ResizeCPUs(m.ctx(), 2); return err },
	}
	for _, call := range calls {
		jobs.Go(func() {
			if err := call(); !errdefs.IsUnavailable(err) {
				t.Error(err)
			}
		})
	}
	time.Sleep(200 * time.Millisecond) // all of them wait
	start := time.Now()
	if err := m.Kill(); err != nil {
		t.Error(err)
	}
	jobs.Wait()
	if d := time.Since(start); d > 5*time.Second { // none of the calls would have ended by then
		t.Errorf("killed after %v", d)
	}
}

// image makes an image of a disk, with a text in its first bytes.
func image(t *testing.T, id, text string, mib int64) hypervisor.Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), id)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, mib<<20); err != nil {
		t.Fatal(err)
	}
	return hypervisor.Disk{ID: id, Path: path}
}

// guestPCI is the directory of a device in the guest's sysfs, by its path.
func guestPCI(path string) string {
	bridge, slot, _ := strings.Cut(path, "/")
	return fmt.Sprintf("/guest/sys/devices/pci0000:00/0000:00:%s.0/*:%s.0", bridge, slot)
}

// node begins a script that has the device node of a disk in $node.
func node(block string) string {
	return "node=$(echo " + block + "); node=/guest/dev/${node##*/}; test -b $node || exit 1; "
}

func plugDisk(t *testing.T, m *machine) {
	disk := image(t, "one", "on the host", 4)
	path, err := m.PlugDisk(m.ctx(), disk)
	if err != nil {
		t.Fatal(err)
	}
	if path != "02/02" { // the SCSI controller has the first slot
		t.Errorf("path %s", path)
	}
	block := guestPCI(path) + "/virtio*/block/vd?"
	m.seen("cat "+block+"/size "+block+"/ro "+block+"/serial", "8192\n0\none")
	m.seen(node(block)+"head -c 11 $node", "on the host")
	m.look(node(block) + "echo in the guest | dd of=$node conv=fsync")
	b, err := os.ReadFile(disk.Path)
	if err != nil || !strings.HasPrefix(string(b), "in the guest") {
		t.Errorf("the image has %.20q, %v", b, err)
	}

	if err := os.Truncate(disk.Path, 12<<20); err != nil {
		t.Fatal(err)
	}
	if size, err := m.GrowDisk(m.ctx(), "one"); size != 12<<20 || err != nil {
		t.Errorf("grown to %d, %v", size, err)
	}
	m.seen("cat "+block+"/size", "24576")

	ro := image(t, "two", "read only", 1)
	ro.ReadOnly = true
	second, err := m.PlugDisk(m.ctx(), ro)
	if err != nil {
		t.Fatal(err)
	}
	m.seen("cat "+guestPCI(second)+"/virtio*/block/vd?/ro", "1")

	for _, id := range []string{"one", "two"} {
		start := time.Now()
		if err := m.UnplugDisk(m.ctx(), id); err != nil {
			t.Fatal(err)
		}
		t.Logf("unplugged after %v", time.Since(start))
		m.seen("ls -d "+guestPCI(map[string]string{"one": path, "two": second}[id])+" 2>/dev/null", "")
	}
	if err := m.UnplugDisk(m.ctx(), "one"); !errdefs.IsNotFound(err) {
		t.Errorf("unplugged twice: %v", err)
	}
}

func plugSCSI(t *testing.T, m *machine) {
	for i, id := range []string{"a", "b"} {
		address, err := m.PlugSCSIDisk(m.ctx(), image(t, id, "scsi "+id, 2))
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%d:0", i); address != want {
			t.Errorf("address %s, want %s", address, want)
		}
		m.seen(node(fmt.Sprintf("/guest/sys/bus/scsi/devices/*:0:%d:0/block/sd?", i))+"head -c 6 $node", "scsi "+id)
	}
	for i, id := range []string{"a", "b"} {
		if err := m.UnplugDisk(m.ctx(), id); err != nil {
			t.Error(err)
		}
		m.seen(fmt.Sprintf("ls -d /guest/sys/bus/scsi/devices/*:0:%d:0 2>/dev/null", i), "")
	}
}

// tap makes a tap of so many queues, one descriptor each. It goes with them.
func tap(t *testing.T, name string, queues int) []*os.File {
	t.Helper()
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	var files []*os.File
	for range queues {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var req struct { // struct ifreq of linux/if.h
			name  [unix.IFNAMSIZ]byte
			flags uint16
			_     [22]byte
		}
		copy(req.name[:], name)
		req.flags = flags
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); errno != 0 {
			t.Fatal(errno)
		}
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func plugNIC(t *testing.T, m *machine) {
	for _, queues := range []int{1, 2} {
		name := fmt.Sprintf("vmshimtest%d", queues)
		taps := tap(t, name, queues)
		path, err := m.PlugNIC(m.ctx(), hypervisor.NIC{ID: "eth", MAC: "02:00:00:00:00:07", MTU: 1400}, taps, nil)
		closeAll(taps)
		if err != nil {
			t.Fatal(err)
		}
		nic := guestPCI(path) + "/virtio*/net/eth*"
		// Two interrupts for each pair of queues, and one for the configuration.
		m.seen("cat "+nic+"/address "+nic+"/mtu; ls "+guestPCI(path)+"/msi_irqs | wc -l", fmt.Sprintf("02:00:00:00:00:07\n1400\n%d", 2*queues+1))
		if _, err := os.Stat("/sys/class/net/" + name); err != nil {
			t.Errorf("tap of a plugged card: %v", err)
		}
		if err := m.UnplugNIC(m.ctx(), "eth"); err != nil {
			t.Fatal(err)
		}
		m.seen("ls -d "+guestPCI(path)+" 2>/dev/null", "")
		if _, err := os.Stat("/sys/class/net/" + name); err == nil {
			t.Error("somebody still holds the tap")
		}
	}
}

// A share that comes later is mounted by a container like the first one.
func plugShare(t *testing.T, m *machine) {
	dir := t.TempDir()
	path, err := m.PlugShare(m.ctx(), hypervisor.Share{Tag: "later, on", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "greeting"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.seen("ls "+guestPCI(path)+"/virtio*/driver >/dev/null && echo there", "there")
	out, errs, status := m.run("shared", func(r *protocol.CreateContainerRequest) {
		const at = "/run/kata-containers/later"
		r.Storages = []*protocol.Storage{{Driver: "virtio-fs", Source: "later, on", Fstype: "virtiofs", MountPoint: at}}
		r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/later", Source: at, Type: "bind", Options: []string{"rbind"}})
	}, "/bin/sh", "-c", "cat /later/greeting; echo thanks > /later/answer")
	if out != "hello" || status != 0 {
		t.Errorf("got %q, %q, %d", out, errs, status)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "answer")); string(b) != "thanks\n" {
		t.Errorf("answer %q, %v", b, err)
	}
	if n := len(m.Processes()); n != 4 && n != 3 { // without vhost-device-vsock where the kernel has vsock
		t.Errorf("%d processes", n)
	}
	processes := len(m.Processes())
	if err := m.UnplugShare(m.ctx(), "later, on"); err != nil {
		t.Fatal(err)
	}
	m.seen("ls -d "+guestPCI(path)+" 2>/dev/null", "")
	if n := len(m.Processes()); n != processes-1 {
		t.Errorf("%d processes of %d", n, processes)
	}
	if _, err := m.PlugShare(m.ctx(), hypervisor.Share{Tag: "nowhere", Dir: filepath.Join(dir, "nowhere")}); err == nil {
		t.Error("a directory was shared that is not there")
	} else if !strings.Contains(err.Error(), "virtiofsd ended: exit status") {
		t.Error(err)
	}
	if n := len(m.Processes()); n != processes-1 {
		t.Errorf("%d processes of %d", n, processes)
	}
}

func plugPCI(t *testing.T, m *machine) {
	path, err := m.PlugPCI(m.ctx(), hypervisor.PCIDevice{ID: "test", Driver: "pci-testdev"})
	if err != nil {
		t.Fatal(err)
	}
	m.seen("cat "+guestPCI(path)+"/vendor "+guestPCI(path)+"/device", "0x1b36\n0x0005") // QEMU's docs/specs/pci-ids
	if err := m.UnplugPCI(m.ctx(), "test"); err != nil {
		t.Fatal(err)
	}
	m.seen("ls -d "+guestPCI(path)+" 2>/dev/null", "")
	if _, err := m.PlugPCI(m.ctx(), hypervisor.PCIDevice{ID: "test", Driver: "nosuch"}); err == nil {
		t.Error("a device without a driver")
	}
}

func plugCPU(t *testing.T, m *machine) {
	const cpus = "cat /guest/sys/devices/system/cpu/present"
	m.seen(cpus, "0")
	if n, err := m.ResizeCPUs(m.ctx(), 2); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	// A recent Linux (6.12.117, not 6.1) has no place for another CPU where it
	// does not know the hypervisor (acpi_is_processor_usable): TCG is none.
	takes := m.look("cat /guest/sys/devices/system/cpu/possible") != "0"
	if takes {
		m.seen(cpus, "0-1")
		m.look("echo 1 > /guest/sys/devices/system/cpu/cpu1/online")
		m.seen("grep -c ^processor /proc/cpuinfo", "2")
	} else if vmtest.KVM() == nil {
		t.Error("the guest has no place for another cpu")
	}
	if n, err := m.ResizeCPUs(m.ctx(), 3); n != 2 || !errdefs.IsResourceExhausted(err) {
		t.Errorf("grown to %d, %v", n, err)
	}
	n, err := m.ResizeCPUs(m.ctx(), 1)
	switch {
	case err == nil && n == 1: // from QEMU 10 on
		m.seen(cpus, "0")
	case n == 2 && errdefs.IsFailedPrecondition(err):
		t.Log(err)
		if takes {
			m.look("echo 0 > /guest/sys/devices/system/cpu/cpu1/online")
			m.seen("grep -c ^processor /proc/cpuinfo", "1")
		}
	default:
		t.Errorf("shrunk to %d, %v", n, err)
	}
}

func plugMemory(t *testing.T, m *machine) {
	total := func() (kib int) {
		_, err := fmt.Sscan(m.look("while read -r name n unit; do test $name = MemTotal: && echo $n; done < /proc/meminfo"), &kib)
		if err != nil {
			t.Fatal(err)
		}
		return kib
	}
	before := total()
	for _, mib := range []int{768, 1024, 300, 256} {
		start := time.Now()
		got, err := m.ResizeMemory(m.ctx(), mib)
		if got.MiB != mib || err != nil {
			t.Fatalf("resized to %+v, %v, want %d", got, err, mib)
		}
		t.Logf("%d MiB after %v", mib, time.Since(start))
		if now, want := total(), before+(mib-256)<<10; now != want {
			t.Errorf("the guest has %d KiB, want %d", now, want)
		}
	}
	if got, err := m.ResizeMemory(m.ctx(), 1026); got.MiB != 256 || !errdefs.IsResourceExhausted(err) {
		t.Errorf("grown to %+v, %v", got, err)
	}
}

// The bus is filled from many sides at once; what is too much is refused, and
// nothing of it is left.
func plugEverySlot(t *testing.T, m *machine) {
	free := 31
	for _, p := range m.Plugged() {
		if p.Kind != hypervisor.KindCPU { // it may have to stay
			free--
		}
	}
	disks := make([]hypervisor.Disk, free+2)
	for i := range disks {
		disks[i] = image(t, fmt.Sprintf("d%d", i), "", 1)
	}
	errs := make([]error, len(disks))
	var jobs sync.WaitGroup
	for i, d := range disks {
		jobs.Go(func() { _, errs[i] = m.PlugDisk(m.ctx(), d) })
	}
	jobs.Wait()
	var plugged []string
	for i, err := range errs {
		switch {
		case err == nil:
			plugged = append(plugged, disks[i].ID)
		case !errors.Is(err, errdefs.ErrResourceExhausted):
			t.Error(err)
		}
	}
	if len(plugged) != free {
		t.Errorf("%d were plugged, want %d", len(plugged), free)
	}
	m.seen("ls -d /guest/sys/block/vd* | wc -l", fmt.Sprint(free))
	for _, id := range plugged {
		jobs.Go(func() {
			if err := m.UnplugDisk(m.ctx(), id); err != nil {
				t.Error(err)
			}
		})
	}
	jobs.Wait()
	m.seen("ls -d /guest/sys/block/vd* 2>/dev/null | wc -l", "0")
}
