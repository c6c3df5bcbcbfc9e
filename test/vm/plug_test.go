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
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// TestVMPlug adds devices to a running guest and removes them. One machine
// serves all parts, which leave it as it was.
func TestVMPlug(t *testing.T) {
	m := sandbox(t)
	m.create("look", func(r *protocol.CreateContainerRequest) {
		r.OCI.Mounts = append(r.OCI.Mounts,
			&protocol.Mount{Destination: "/guest/sys", Source: "/sys", Type: "bind", Options: []string{"rbind"}},
			&protocol.Mount{Destination: "/guest/dev", Source: "/dev", Type: "bind", Options: []string{"rbind"}},
		)
		r.OCI.Linux.Resources.Devices = []*protocol.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}, "/bin/sleep", "100000")
	m.startContainer("look")
	before := m.look("cd /guest/sys; ls bus/pci/devices block")
	for _, part := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"disk", plugDisk},
		{"scsi disk", plugSCSI},
		{"nic", plugNIC},
		{"every slot", plugEverySlot},
	} {
		t.Run(part.name, func(t *testing.T) {
			descriptors := openDescriptors(t)
			part.test(t, m.on(t))
			if now := openDescriptors(t); !slices.Equal(now, descriptors) {
				t.Errorf("descriptors %q, before %q", now, descriptors)
			}
		})
	}
	// The SCSI controller stays.
	m.seen("cd /guest/sys; ls bus/pci/devices block", before+"\n0000:01:01.0")
}

// look runs a script in the container that sees the guest's devices.
func (m *machine) look(script string) string {
	m.tb.Helper()
	return m.inContainer("look", "/bin/sh", "-c", script)
}

// seen waits until the guest's answer to the script is that.
func (m *machine) seen(script, want string) {
	m.tb.Helper()
	var got string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got = m.look(script); got == want {
			return
		}
	}
	m.tb.Errorf("the guest has %q, want %q: %s", got, want, script)
}

func openDescriptors(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(target, "/proc/") && !strings.HasPrefix(target, "socket:") && !strings.HasPrefix(target, "anon_inode") {
			list = append(list, target)
		}
	}
	return list
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
	if path != "02/01" {
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

// The bus is filled from many sides at once; what is too much is refused, and
// nothing of it is left.
func plugEverySlot(t *testing.T, m *machine) {
	free := 31 - len(m.Plugged())
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
