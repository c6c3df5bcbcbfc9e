package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

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
	// While ext4 allocates what was written, it counts that twice.
	if got := m.inContainer(id, "/bin/sh", "-c", "busybox stat -c '%A %g' /vol; echo kept > /vol/f; busybox sync"); got != "drwxrwsr-x 77" {
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
		statfs := func() string {
			return m.inContainer(id, "/bin/sh", "-c", "busybox stat -f -c '%b %f %a %S %c %d' /vol")
		}
		var bytes, inodes *protocol.VolumeUsage
		out := statfs()
		// Behind a write xfs gives back what it had set aside.
		m.eventually("nothing moves", func() bool {
			before := out
			bytes, inodes = stats()
			out = statfs()
			return out == before
		})
		var total, free, available, block, files, filesFree uint64
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

// A volume can be on a SCSI disk as well, and on one that is named by its node.
func otherDisks(t *testing.T, m *machine) {
	fill := func(id string) hypervisor.Disk {
		img, tree := image(t, id, "", 8), t.TempDir()
		if err := os.WriteFile(filepath.Join(tree, "f"), []byte("on "+id), 0o644); err != nil {
			t.Fatal(err)
		}
		onHost(t, "mkfs.ext4", "-q", "-F", "-d", tree, img.Path)
		return img
	}
	scsi, err := m.PlugSCSIDisk(m.ctx(), fill("scsi"))
	if err != nil {
		t.Fatal(err)
	}
	pci, err := m.PlugDisk(m.ctx(), fill("node"))
	if err != nil {
		t.Fatal(err)
	}
	m.seen("ls "+guestPCI(pci)+"/virtio*/block | wc -l", "1")
	node := "/dev/" + m.look("ls "+guestPCI(pci)+"/virtio*/block")
	m.create("disks", func(r *protocol.CreateContainerRequest) {
		for driver, source := range map[string]string{"scsi": scsi, "mmioblk": node} {
			at := guestRoot + "sandbox/storage/" + driver
			r.Storages = append(r.Storages, &protocol.Storage{Driver: driver, Source: source, Fstype: "ext4", MountPoint: at, Options: []string{"ro"}})
			r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/" + driver, Source: at, Type: "bind", Options: []string{"rbind"}})
		}
	}, "/bin/sleep", "1000")
	m.startContainer("disks")
	got := m.inContainer("disks", "/bin/sh", "-c", "cat /scsi/f; echo; cat /mmioblk/f; echo; touch /scsi/x 2>&1; touch /mmioblk/x 2>&1; true")
	if want := "on scsi\non node\ntouch: /scsi/x: Read-only file system\ntouch: /mmioblk/x: Read-only file system"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	m.remove("disks")
	for _, id := range []string{"scsi", "node"} { // which nothing of the guest uses any more
		if err := m.UnplugDisk(m.ctx(), id); err != nil {
			t.Error(err)
		}
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
