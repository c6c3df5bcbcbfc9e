package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// hotplugTimeout is how long a device may take to appear when the host does not
// say.
const hotplugTimeout = 10 * time.Second

// devices finds those of the guest, and waits for those that are to come.
type devices struct {
	sys     string // where sysfs is
	timeout time.Duration
	events  *uevents
}

func newDevices(timeout time.Duration, events *uevents) *devices {
	if timeout <= 0 {
		timeout = hotplugTimeout
	}
	return &devices{sys: "/sys", timeout: timeout, events: events}
}

// A node is a device that has a file in /dev.
type node struct {
	path         string
	kind         string // "b" or "c"
	major, minor int64
}

// await calls find until that does not say fs.ErrNotExist, as long as a device
// may take.
func await[T any](ctx context.Context, d *devices, what string, find func() (T, error)) (found T, err error) {
	err = d.until(ctx, what, func() (bool, error) {
		var err error
		found, err = find()
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return true, err
	})
	return found, err
}

// until waits for what done says, as long as a device may take.
func (d *devices) until(ctx context.Context, what string, done func() (bool, error)) error {
	bounded, cancel := context.WithTimeoutCause(ctx, d.timeout,
		fmt.Errorf("not there after %v: %w", d.timeout, context.DeadlineExceeded))
	defer cancel()
	if err := d.events.await(bounded, done); err != nil {
		return fmt.Errorf("wait for %s: %w", what, err)
	}
	return nil
}

// pciDevice waits for a PCI function and returns its directory in sysfs.
func (d *devices) pciDevice(ctx context.Context, path pciPath) (string, error) {
	return await(ctx, d, fmt.Sprintf("device at PCI path %s", path), func() (string, error) { return d.findPCI(path) })
}

// pciDisk waits for a virtio disk.
func (d *devices) pciDisk(ctx context.Context, path pciPath) (node, error) {
	return await(ctx, d, fmt.Sprintf("disk at PCI path %s", path), func() (node, error) {
		dir, err := d.findPCI(path)
		if err != nil {
			return node{}, err
		}
		return d.findBlock(filepath.Join(dir, "virtio*", "block", "*"))
	})
}

// scsiDisk waits for a SCSI disk, on whatever host it is.
func (d *devices) scsiDisk(ctx context.Context, a scsiAddress) (node, error) {
	scanned := map[string]bool{}
	pattern := filepath.Join(d.sys, "bus/scsi/devices", fmt.Sprintf("*:0:%d:%d", a.id, a.lun), "block", "*")
	return await(ctx, d, fmt.Sprintf("SCSI disk %s", a), func() (node, error) {
		n, err := d.findBlock(pattern)
		if !errors.Is(err, fs.ErrNotExist) {
			return n, err
		}
		hosts, _ := filepath.Glob(filepath.Join(d.sys, "class/scsi_host/host*/scan")) // the pattern is right
		for _, scan := range hosts {
			if scanned[scan] {
				continue
			}
			scanned[scan] = true
			// Only there: 255 other targets take an emulated guest minutes.
			if err := setFile(scan, fmt.Sprintf("0 %d %d", a.id, a.lun)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return node{}, fmt.Errorf("scan SCSI host: %w", err)
			}
		}
		return d.findBlock(pattern)
	})
}

// disk waits for a disk by the path of its node.
func (d *devices) disk(ctx context.Context, path string) (node, error) {
	if err := checkDevice(path); err != nil {
		return node{}, err
	}
	return await(ctx, d, "disk "+path, func() (node, error) {
		n, err := statNode(path)
		if err == nil && n.kind != "b" {
			err = invalid("%s is not a disk", path)
		}
		return n, err
	})
}

// anyDisk waits for a disk by its PCI path or by the path of its node.
func (d *devices) anyDisk(ctx context.Context, source string) (node, error) {
	if strings.HasPrefix(source, "/") {
		return d.disk(ctx, source)
	}
	path, err := parsePCIPath(source)
	if err != nil {
		return node{}, err
	}
	return d.pciDisk(ctx, path)
}

func checkDevice(path string) error {
	if err := checkPath("device", path); err != nil {
		return err
	}
	if !strings.HasPrefix(path, "/dev/") {
		return invalid("device %q is not in /dev", bound(path, 512))
	}
	return nil
}

// findPCI follows the path through the buses behind each bridge.
func (d *devices) findPCI(path pciPath) (string, error) {
	// The directory itself is below its host bridge, which is not the same on
	// every architecture.
	dir, err := filepath.EvalSymlinks(filepath.Join(d.sys, "bus/pci/devices", path[0].on("0000:00")))
	if err != nil {
		return "", err
	}
	for _, function := range path[1:] {
		buses, err := os.ReadDir(filepath.Join(dir, "pci_bus"))
		if err != nil {
			return "", err
		}
		if len(buses) != 1 {
			return "", fs.ErrNotExist
		}
		dir = filepath.Join(dir, function.on(buses[0].Name()))
		if _, err := os.Stat(dir); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// findBlock finds the one block device that a pattern of directories in sysfs
// leads to.
func (d *devices) findBlock(pattern string) (node, error) {
	dirs, _ := filepath.Glob(pattern) // the pattern is right
	if len(dirs) == 0 {
		return node{}, fs.ErrNotExist
	}
	return d.nodeOf(dirs[0])
}

// nodeOf is the file of a device by its directory in sysfs, which the kernel
// makes first.
func (d *devices) nodeOf(dir string) (node, error) {
	uevent, err := os.ReadFile(filepath.Join(dir, "uevent"))
	if err != nil {
		return node{}, err
	}
	major, minor, name := parseUevent(string(uevent))
	if name == "" {
		return node{}, fs.ErrNotExist
	}
	n, err := statNode(filepath.Join("/dev", name))
	if err == nil && (n.major != major || n.minor != minor) {
		err = fs.ErrNotExist // of a device that is going
	}
	return n, err
}

// parseUevent reads the file of that name of a device that has a node.
func parseUevent(text string) (major, minor int64, name string) {
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		switch key {
		case "MAJOR":
			major, _ = strconv.ParseInt(value, 10, 32)
		case "MINOR":
			minor, _ = strconv.ParseInt(value, 10, 32)
		case "DEVNAME":
			if filepath.IsLocal(value) {
				name = value
			}
		}
	}
	return major, minor, name
}

func statNode(path string) (node, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return node{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	n := node{path: path, major: int64(unix.Major(st.Rdev)), minor: int64(unix.Minor(st.Rdev))}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		n.kind = "b"
	case unix.S_IFCHR:
		n.kind = "c"
	default:
		return node{}, invalid("%s is not a device", path)
	}
	return n, nil
}

// bindVFIO gives a PCI function to the driver that lets a process drive it, and
// returns the file of its group.
func (d *devices) bindVFIO(ctx context.Context, dir string) (n node, undo func() error, err error) {
	driver := filepath.Join(d.sys, "bus/pci/drivers/vfio-pci")
	if _, err := os.Stat(driver); err != nil {
		return node{}, nil, precondition("the guest's kernel has no driver vfio-pci")
	}
	if err := d.rebind(dir, "vfio-pci"); err != nil {
		return node{}, nil, err
	}
	undo = func() error { return d.rebind(dir, "") }
	if now, _ := os.Readlink(filepath.Join(dir, "driver")); filepath.Base(now) != "vfio-pci" {
		// Without an IOMMU the driver refuses (vfio_group_find_or_alloc).
		err := precondition("vfio-pci does not take device %s: the machine needs an IOMMU, or the kernel's module vfio enable_unsafe_noiommu_mode", filepath.Base(dir))
		return node{}, nil, errors.Join(err, undo())
	}
	group, err := os.Readlink(filepath.Join(dir, "iommu_group"))
	if err != nil {
		return node{}, nil, errors.Join(err, undo())
	}
	name := filepath.Base(group)
	if kind, err := os.ReadFile(filepath.Join(dir, "iommu_group/name")); err == nil && strings.TrimSpace(string(kind)) == "vfio-noiommu" {
		name = "noiommu-" + name
	}
	path := "/dev/vfio/" + name
	n, err = await(ctx, d, "device "+path, func() (node, error) { return statNode(path) })
	if err != nil {
		return node{}, nil, errors.Join(err, undo())
	}
	return n, undo, nil
}

// rebind takes a PCI function from its driver and offers it to another one; ""
// is whichever wants it.
func (d *devices) rebind(dir, driver string) error {
	address := filepath.Base(dir)
	write := func(path, value string) error {
		err := setFile(path, value)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // no driver has it, or the device is gone
		}
		return err
	}
	if err := errors.Join(
		write(filepath.Join(dir, "driver_override"), driver+"\n"),
		write(filepath.Join(dir, "driver/unbind"), address),
	); err != nil {
		return fmt.Errorf("give device %s to driver %q: %w", address, driver, err)
	}
	// That no driver takes it is not told here.
	if err := write(filepath.Join(d.sys, "bus/pci/drivers_probe"), address); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("give device %s to driver %q: %w", address, driver, err)
	}
	return nil
}

// setFile writes to a file of the kernel's. One that is not there is not made,
// which the kernel would refuse in other words.
func setFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// loadDriver loads a module, if the kernel is one that has modules.
func (c Config) loadDriver(ctx context.Context, name string) error {
	if c.LoadModule == nil {
		return nil
	}
	err := c.LoadModule(ctx, name, nil)
	if errdefs.IsNotFound(err) { // built in, or nothing we have
		return nil
	}
	return err
}
