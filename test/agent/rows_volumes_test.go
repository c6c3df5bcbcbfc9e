package agent_test

import (
	"crypto/md5"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

var volumeRows = []row{
	{46, "GuestVolumeStats", "GetVolumeStats", "bytes and inodes equal statfs in the guest; available is what users get", proveGuestVolumeStats, with[noGuestVolumeStats]},
	{47, "ResizeGuestVolume", "ResizeVolume", "df in the guest after the disk grew, ext4 and xfs", proveResizeGuestVolume, with[noResizeGuestVolume]},
	{50, "RemoveStaleShareMounts", "RemoveStaleVirtiofsShareMounts", "mountinfo of the guest: what the host has unmounted is gone, the rest is there", proveRemoveStaleShareMounts, with[noRemoveStaleShareMounts]},
	{51, "UpdateEphemeralMounts", "UpdateEphemeralMounts", "statfs in the guest: the tmpfs has its new size, and its files", proveUpdateEphemeralMounts, with[noUpdateEphemeralMounts]},
}

var disks int // numbers for names

// image makes an image file and formats it.
func (e *env) image(mibs int64, format ...string) hypervisor.Disk {
	disks++
	d := hypervisor.Disk{ID: fmt.Sprintf("d%d", disks), Path: filepath.Join(e.t.TempDir(), fmt.Sprintf("d%d.img", disks))}
	e.ok(os.WriteFile(d.Path, nil, 0o600))
	e.ok(os.Truncate(d.Path, mibs*mib))
	if len(format) > 0 {
		if out, err := exec.Command(format[0], append(format[1:], d.Path)...).CombinedOutput(); err != nil {
			e.fail("%v: %w: %s", format, err, out)
		}
	}
	return d
}

// plug plugs a disk, for the time of the proof.
func (e *env) plug(d hypervisor.Disk) (pciPath string) {
	g := e.guest
	pciPath, err := g.PlugDisk(e.ctx, d)
	e.ok(err)
	e.undo.Add(func() error {
		if g.gone() {
			return nil
		}
		ctx, cancel := e.later()
		defer cancel()
		return g.UnplugDisk(ctx, d.ID)
	})
	return pciPath
}

// plugDisk plugs an empty disk, and gives its name in the guest.
func (e *env) plugDisk(mibs int64, format ...string) (d hypervisor.Disk, pciPath, device string) {
	d = e.image(mibs, format...)
	pciPath = e.plug(d)
	return d, pciPath, e.device(d)
}

// device waits for the name of a disk in the guest.
func (e *env) device(d hypervisor.Disk) (name string) {
	e.until("the guest has the disk", func() bool {
		name = e.look("grep -l '^" + d.ID + "$' /sys/block/*/serial 2>/dev/null | cut -d/ -f4; true")
		return name != ""
	})
	return name
}

func proveGuestVolumeStats(e *env) {
	_, _, device := e.plugDisk(16)
	e.look("mke2fs -m 10 /dev/" + device + " >/dev/null && mkdir -p /run/volume && mount -t ext4 /dev/" + device + " /run/volume && head -c 1000000 /dev/zero > /run/volume/f && sync")
	e.undo.Add(e.guestDo("umount /run/volume && rmdir /run/volume"))
	answer, err := e.GuestVolumeStats(e.ctx, "/run/volume")
	e.ok(err)
	var size, total, free, available, inodes, freeInodes uint64
	_, err = fmt.Sscan(e.look("stat -f -c '%S %b %f %a %c %d' /run/volume"), &size, &total, &free, &available, &inodes, &freeInodes)
	e.ok(err)
	var got []string
	for _, u := range answer.GetUsage() {
		got = append(got, fmt.Sprintf("%s: %d of %d, %d available", u.GetUnit(), u.GetUsed(), u.GetTotal(), u.GetAvailable()))
	}
	e.equal("usage", strings.Join(got, "; "), fmt.Sprintf("BYTES: %d of %d, %d available; INODES: %d of %d, %d available",
		(total-free)*size, total*size, available*size, inodes-freeInodes, inodes, freeInodes))
	if available == free {
		e.fail("the volume keeps nothing back: %d blocks", free)
	}
}

func proveResizeGuestVolume(e *env) {
	for _, fs := range []struct {
		name   string
		format []string
		mib    int64
	}{
		{"ext4", []string{"mkfs.ext4", "-q"}, 32},
		{"xfs", []string{"mkfs.xfs", "-q"}, 304},
	} {
		d := e.image(fs.mib, fs.format...)
		pciPath := e.plug(d)
		point := sandboxDir + "/storage/" + d.ID
		e.runWith(func(r *protocol.CreateContainerRequest) {
			r.Storages = []*protocol.Storage{{Driver: "blk", Source: pciPath, Fstype: fs.name, MountPoint: point}}
			r.OCI.Mounts = append(r.OCI.Mounts, &protocol.Mount{Destination: "/volume", Source: point, Type: "bind", Options: []string{"rbind"}})
		}, "/bin/sleep", "1000")
		e.equal("type", e.look("awk '$2==\""+point+"\"{print $3}' /proc/mounts"), fs.name)
		kib := "df -k " + point + " | awk 'END{print $2}'"
		before := e.number(kib)
		e.ok(os.Truncate(d.Path, 2*fs.mib*mib))
		_, err := e.guest.GrowDisk(e.ctx, d.ID)
		e.ok(err)
		e.ok(e.ResizeGuestVolume(e.ctx, point, uint64(2*fs.mib*mib)))
		if after := e.number(kib); after < before*17/10 {
			e.fail("%s has %d KiB, had %d: the disk has twice as much", fs.name, after, before)
		}
	}
}

func proveRemoveStaleShareMounts(e *env) {
	// What the host mounts below the share the guest mounts when it sees it. It
	// remembers names for a second, even of what was not there.
	disks++
	stale, live := fmt.Sprintf("stale%d", disks), fmt.Sprintf("live%d", disks)
	for _, name := range []string{stale, live} {
		dir := filepath.Join(e.guest.Share, name)
		e.ok(os.Mkdir(dir, 0o755))
		e.undo.Add(func() error { return os.Remove(dir) })
		e.ok(unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
		e.undo.Add(e.guestDo("umount -l " + shareDir + "/" + name + " 2>/dev/null; true"))
		e.undo.Add(func() error { _ = unix.Unmount(dir, unix.MNT_DETACH); return nil })
		e.ok(os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
		e.look("cat " + shareDir + "/" + name + "/f")
	}
	const mounted = `awk '$5 ~ "^` + shareDir + `/(stale|live)"{print $5}' /proc/self/mountinfo`
	e.equal("mounted at first", e.look(mounted), shareDir+"/"+stale+"\n"+shareDir+"/"+live)
	e.ok(unix.Unmount(filepath.Join(e.guest.Share, stale), unix.MNT_DETACH))
	e.until("the mount is gone", func() bool {
		e.ok(e.RemoveStaleShareMounts(e.ctx))
		return e.look(mounted) == shareDir+"/"+live
	})
}

func proveUpdateEphemeralMounts(e *env) {
	var storage *protocol.Storage
	id := e.runWith(func(r *protocol.CreateContainerRequest) {
		storage = scratch(r.ContainerId)
		r.Storages = []*protocol.Storage{storage}
	}, "/bin/sleep", "1000")
	_ = id
	point := storage.MountPoint
	size := "stat -f -c '%S %b' " + point + " | awk '{print $1*$2}'"
	e.look("echo stays > " + point + "/f")
	e.equal("size at first", e.number(size), int64(mib))
	e.ok(e.UpdateEphemeralMounts(e.ctx, []*protocol.Storage{{
		Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: point, Options: []string{"size=4m"},
	}}))
	e.equal("size", e.number(size), int64(4*mib))
	e.equal("file", e.look("cat "+point+"/f"), "stays")
}

func md5sum(b []byte) string { return fmt.Sprintf("%x", md5.Sum(b)) }
