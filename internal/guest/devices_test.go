package guest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// testDevices are those of a made-up sysfs, with the kernel's real events.
func testDevices(t *testing.T) *devices {
	t.Helper()
	events, err := newUevents()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- events.run() }()
	t.Cleanup(func() {
		events.close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	d := newDevices(time.Minute, events)
	d.sys = t.TempDir()
	return d
}

// put makes files below sysfs; a value that begins with -> is a link.
func (d *devices) put(t *testing.T, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(d.sys, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, ok := strings.CutPrefix(text, "->"); ok {
			err = os.Symlink(to, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// q35 is a bridge at 02 with a disk at 05 behind it, as Linux shows them. The
// disk's node is one that every machine has.
const pciDisk = "devices/pci0000:00/0000:00:02.0/0000:01:05.0"

var q35 = map[string]string{
	"bus/pci/devices/0000:00:02.0":                             "->../../../devices/pci0000:00/0000:00:02.0",
	"devices/pci0000:00/0000:00:02.0/pci_bus/0000:01/uevent":   "",
	pciDisk + "/vendor":                                        "0x1af4\n",
	"devices/pci0000:00/0000:00:03.0/vendor":                   "0x1af4\n",
	"bus/pci/devices/0000:00:03.0":                             "->../../../devices/pci0000:00/0000:00:03.0",
	"bus/scsi/devices/2:0:1:7":                                 "->../../../devices/x/2:0:1:7",
	"devices/x/2:0:1:7/block/loop1/uevent":                     "MAJOR=7\nMINOR=1\nDEVNAME=loop1\nDEVTYPE=disk\n",
	"class/scsi_host/host2/scan":                               "",
	"devices/pci0000:00/0000:00:02.0/0000:01:06.0/pci_bus/a/x": "",
	"devices/pci0000:00/0000:00:02.0/0000:01:06.0/pci_bus/b/x": "",
}

var arrived = map[string]string{pciDisk + "/virtio3/block/loop0/uevent": "MAJOR=7\nMINOR=0\nDEVNAME=loop0\nDEVTYPE=disk\n"}

func TestFindDevices(t *testing.T) {
	d := testDevices(t)
	d.put(t, q35)
	path := func(s string) pciPath {
		p, err := parsePCIPath(s)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for s, want := range map[string]string{
		"02": "0000:00:02.0", "02/05": "0000:01:05.0", "03": "0000:00:03.0",
		"04": "", "02/06/00": "", "03/00": "", "02/05/01": "", "02.1/05": "", "02/05.1": "",
	} {
		dir, err := d.findPCI(path(s))
		if want == "" && !errors.Is(err, fs.ErrNotExist) || want != "" && (err != nil || filepath.Base(dir) != want) {
			t.Errorf("%s: %q, %v, want %q", s, dir, err, want)
		}
	}
	// There already.
	n, err := d.scsiDisk(t.Context(), scsiAddress{1, 7})
	if want := (node{"/dev/loop1", "b", 7, 1}); err != nil || n != want {
		t.Errorf("got %+v, %v, want %+v", n, err, want)
	}
	d.put(t, arrived)
	n, err = d.anyDisk(t.Context(), "02/05")
	if want := (node{"/dev/loop0", "b", 7, 0}); err != nil || n != want {
		t.Errorf("got %+v, %v, want %+v", n, err, want)
	}
	for source, want := range map[string]error{
		"/etc/passwd": errdefs.ErrInvalidArgument, "/dev/null": errdefs.ErrInvalidArgument, "/dev/../etc": errdefs.ErrInvalidArgument,
		"/dev/shm": errdefs.ErrInvalidArgument, "vda": errdefs.ErrInvalidArgument, "": errdefs.ErrInvalidArgument,
	} {
		if n, err := d.anyDisk(t.Context(), source); !errors.Is(err, want) {
			t.Errorf("%q: %+v, %v", source, n, err)
		}
	}
	// Waited for in vain: the error says what for.
	d.timeout = 20 * time.Millisecond
	if _, err := d.anyDisk(t.Context(), "02/07"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "disk at PCI path 02/07") {
		t.Errorf("got %v", err)
	}
	if _, err := d.scsiDisk(t.Context(), scsiAddress{3, 0}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "SCSI disk 3:0") {
		t.Errorf("got %v", err)
	}
	if scan, err := os.ReadFile(d.sys + "/class/scsi_host/host2/scan"); err != nil || string(scan) != "0 3 0" {
		t.Errorf("host scanned by %q, %v", scan, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.anyDisk(ctx, "/dev/vdx"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// kernelEvent makes the kernel tell that something has changed.
func kernelEvent(t *testing.T) {
	t.Helper()
	if err := os.WriteFile("/sys/devices/virtual/mem/null/uevent", []byte("change"), 0); err != nil {
		t.Fatal(err)
	}
}

func TestAwaitDevice(t *testing.T) {
	d := testDevices(t)
	d.put(t, q35)
	found := make(chan error, 1)
	var looks atomic.Int32
	go func() {
		_, err := await(t.Context(), d, "disk", func() (node, error) {
			defer looks.Add(1)
			dir, err := d.findPCI(pciPath{{2, 0}, {5, 0}})
			if err != nil {
				return node{}, err
			}
			return d.findBlock(dir + "/virtio*/block/*")
		})
		found <- err
	}()
	for looks.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	kernelEvent(t) // of something else
	for looks.Load() < 2 {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-found:
		t.Fatalf("found too early: %v", err)
	default:
	}
	d.put(t, arrived)
	kernelEvent(t)
	if err := <-found; err != nil {
		t.Error(err)
	}
	if len(d.events.waiters) != 0 {
		t.Error("somebody still waits")
	}
}

// The kernel drops events that nobody reads. Who waits then looks again.
func TestAwaitDeviceAfterLostEvents(t *testing.T) {
	events, err := newUevents()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := events.file.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1)
	}); err != nil {
		t.Fatal(err)
	}
	for range 50 {
		kernelEvent(t)
	}
	looks := make(chan struct{}, 1)
	there := atomic.Bool{}
	done := make(chan error, 1)
	go func() {
		done <- events.await(t.Context(), func() (bool, error) {
			defer func() {
				select {
				case looks <- struct{}{}:
				default:
				}
			}()
			return there.Load(), nil
		})
	}()
	<-looks
	there.Store(true)
	ran := make(chan error, 1)
	go func() { ran <- events.run() }()
	if err := <-done; err != nil {
		t.Error(err)
	}
	events.close()
	if err := <-ran; err != nil {
		t.Error(err)
	}
}

func FuzzParseUevent(f *testing.F) {
	f.Add("MAJOR=7\nMINOR=0\nDEVNAME=loop0\nDEVTYPE=disk\n")
	f.Add("DEVNAME=../../etc/passwd\nMAJOR=-1")
	f.Add("DEVNAME=vfio/3\n")
	f.Fuzz(func(t *testing.T, s string) {
		if _, _, name := parseUevent(s); name != "" && !filepath.IsLocal(name) {
			t.Errorf("%q leads to %q", s, name)
		}
	})
}

func TestApplyDevices(t *testing.T) {
	device := func(path, kind string, major, minor int64) specs.LinuxDevice {
		return specs.LinuxDevice{Path: path, Type: kind, Major: major, Minor: minor}
	}
	rule := func(kind string, major, minor int64) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: &minor, Access: "rwm"}
	}
	spec := func() *specs.Spec {
		return &specs.Spec{
			Process: &specs.Process{Env: []string{"PCIDEVICE_A=0000:03:00.0"}},
			Linux: &specs.Linux{
				Devices: []specs.LinuxDevice{device("/dev/a", "b", 8, 0), device("/dev/b", "b", 8, 16), device("/dev/vfio/9", "u", 240, 1), device("/dev/fuse", "c", 10, 229)},
				Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
					{Allow: false, Access: "rwm"}, rule("b", 8, 0), rule("b", 8, 16), rule("c", 240, 1), rule("c", 8, 0), rule("b", -1, -1),
				}},
			},
		}
	}
	got := spec()
	// The numbers of one are those that the other had.
	err := applyDevices(got, []deviceChange{
		{node: node{"/dev/vda", "b", 8, 16}, containerPath: "/dev/a"},
		{node: node{"/dev/vdb", "b", 8, 0}, containerPath: "/dev/b"},
		{node: node{"/dev/vfio/0", "c", 241, 0}, containerPath: "/dev/vfio/9", newPath: "/dev/vfio/0", addresses: map[string]string{"0000:03:00.0": "0000:01:05.0"}},
		{node: node{"/dev/vdc", "b", 8, 32}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := spec()
	want.Process.Env = []string{"PCIDEVICE_A=0000:01:05.0"}
	want.Linux.Devices = []specs.LinuxDevice{device("/dev/a", "b", 8, 16), device("/dev/b", "b", 8, 0), device("/dev/vfio/0", "c", 241, 0), device("/dev/fuse", "c", 10, 229)}
	want.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"}, rule("b", 8, 16), rule("b", 8, 0), rule("c", 241, 0), rule("c", 8, 0), rule("b", -1, -1),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if err := applyDevices(spec(), []deviceChange{{containerPath: "/dev/none"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}

func TestOnlineCPUs(t *testing.T) {
	d := testDevices(t)
	const dir = "devices/system/cpu/"
	d.put(t, map[string]string{dir + "cpu1/online": "1\n", dir + "cpu2/online": "0\n", dir + "cpufreq/online": "0\n"})
	online := func(n int) string {
		b, _ := os.ReadFile(d.sys + "/" + dir + "cpu" + strconv.Itoa(n) + "/online")
		return strings.TrimSpace(string(b))
	}
	done := make(chan error, 1)
	go func() { done <- d.onlineCPUs(t.Context(), 2) }()
	for online(2) != "1" {
		time.Sleep(time.Millisecond)
	}
	d.put(t, map[string]string{dir + "cpu3/online": "0\n", dir + "cpu4/online": "0\n"})
	kernelEvent(t)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if online(3) != "1" || online(4) != "0" {
		t.Errorf("cpu3 %s, cpu4 %s", online(3), online(4))
	}
	d.timeout = 20 * time.Millisecond
	if err := d.onlineCPUs(t.Context(), 2); !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "1 of 2 CPUs") {
		t.Errorf("got %v", err)
	}
}

func TestOnlineMemory(t *testing.T) {
	d := testDevices(t)
	b := &sandbox{devices: d, memoryBlocks: 1}
	if err := b.onlineMemory(t.Context(), true); err != nil { // and no wait: there is no such thing
		t.Error(err)
	}
	const dir = "devices/system/memory/"
	d.put(t, map[string]string{dir + "memory0/state": "online\n", dir + "memory32/state": "offline\n", dir + "memory33/state": "offline\n"})
	if err := b.onlineMemory(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"32", "33"} {
		if s, err := os.ReadFile(d.sys + "/" + dir + "memory" + n + "/state"); err != nil || string(s) != "online_movable" {
			t.Errorf("memory%s is %q, %v", n, s, err)
		}
	}
	// Nothing comes, which is no error.
	d.timeout = 20 * time.Millisecond
	if err := b.onlineMemory(t.Context(), true); err != nil {
		t.Error(err)
	}
	// It has come, and the kernel has taken it by itself.
	d.timeout = time.Minute
	d.put(t, map[string]string{dir + "memory34/state": "online\n"})
	if err := b.onlineMemory(t.Context(), true); err != nil || b.memoryBlocks != 4 {
		t.Errorf("%v, %d blocks", err, b.memoryBlocks)
	}
}

// command runs a program that the test needs.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
	return strings.TrimSpace(string(out))
}
