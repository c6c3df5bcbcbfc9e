package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// A mounted file system grows by an ioctl: the programs that do it ask the kernel
// for the same, and are not needed.

// ResizeVolume implements the protocol: the file system at the path grows to the
// size, or to the end of its disk when that is 0. It never shrinks.
func (s *service) ResizeVolume(ctx context.Context, req *protocol.ResizeVolumeRequest) (*emptypb.Empty, error) {
	path, size := req.GetVolumeGuestPath(), req.GetSize()
	if err := checkPath("volume", path); err != nil {
		return nil, err
	}
	if err := s.sandbox.devices.grow(ctx, path, size); err != nil {
		return nil, fmt.Errorf("resize volume %s: %w", path, err)
	}
	return &emptypb.Empty{}, nil
}

// A growable file system is known by its size in blocks.
type growable interface {
	blocks() (count, size uint64, err error)
	grow(count uint64) error
}

func (d *devices) grow(ctx context.Context, path string, size uint64) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	disk := filepath.Join(d.sys, "dev/block", fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	fsys, err := d.growable(dir, disk)
	if err != nil {
		return err
	}
	count, blockSize, err := fsys.blocks()
	if err != nil {
		return err
	}
	if size > 0 && size/blockSize <= count {
		return nil
	}
	bytes, err := d.grown(ctx, disk, max(size, (count+1)*blockSize))
	if size == 0 && errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil // it has all of the disk already
	}
	if err != nil {
		return err
	}
	if size > 0 {
		bytes = size
	}
	return fsys.grow(bytes / blockSize)
}

// grown waits until a disk has a size, and returns the one it has.
func (d *devices) grown(ctx context.Context, disk string, want uint64) (bytes uint64, err error) {
	// Only SCSI disks have to be told to look.
	err = setFile(filepath.Join(disk, "device/rescan"), "1")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	err = d.until(ctx, fmt.Sprintf("disk of %d bytes", want), func() (bool, error) {
		b, err := os.ReadFile(filepath.Join(disk, "size"))
		if err != nil {
			return false, err
		}
		sectors, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 54)
		bytes = sectors << 9
		return bytes >= want, err
	})
	return bytes, err
}

func (d *devices) growable(dir *os.File, disk string) (growable, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return nil, err
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC: // ext2 and ext3 have the same
		return ext4{dir, disk, d}, nil
	case unix.XFS_SUPER_MAGIC:
		return xfs{dir}, nil
	}
	return nil, precondition("its file system (type %#x) is not ext4 or xfs", st.Type)
}

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

type ext4 struct {
	dir  *os.File
	disk string
	*devices
}

// resizeExt4 is EXT4_IOC_RESIZE_FS of include/uapi/linux/ext4.h.
const resizeExt4 = 0x40086610

func (e ext4) blocks() (count, size uint64, err error) {
	n, err := e.nodeOf(e.disk)
	if err != nil {
		return 0, 0, err
	}
	f, err := os.Open(n.path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	// The kernel has the superblock of a mounted file system where this reads it.
	super := make([]byte, 1024)
	if _, err := f.ReadAt(super, 1024); err != nil {
		return 0, 0, err
	}
	count, size, ok := parseExt4(super)
	if !ok {
		return 0, 0, fmt.Errorf("%s: no superblock", n.path)
	}
	return count, size, nil
}

// parseExt4 reads a superblock (fs/ext4/ext4.h).
func parseExt4(super []byte) (blocks, blockSize uint64, ok bool) {
	if len(super) < 1024 || binary.LittleEndian.Uint16(super[0x38:]) != 0xef53 {
		return 0, 0, false
	}
	blocks = uint64(binary.LittleEndian.Uint32(super[0x4:]))
	if incompatible := binary.LittleEndian.Uint32(super[0x60:]); incompatible&0x80 != 0 { // 64bit
		blocks |= uint64(binary.LittleEndian.Uint32(super[0x150:])) << 32
	}
	shift := binary.LittleEndian.Uint32(super[0x18:])
	if shift > 6 || blocks >= 1<<48 { // EXT4_MAX_BLOCK_LOG_SIZE
		return 0, 0, false
	}
	return blocks, 1024 << shift, true
}

func (e ext4) grow(blocks uint64) error {
	if err := ioctl(e.dir, resizeExt4, unsafe.Pointer(&blocks)); err != nil {
		return fmt.Errorf("grow ext4 to %d blocks: %w", blocks, err)
	}
	return nil
}

type xfs struct{ dir *os.File }

// The requests and their arguments are those of fs/xfs/libxfs/xfs_fs.h.
const (
	xfsGeometry = 0x80705864 // XFS_IOC_FSGEOMETRY_V1
	xfsGrowData = 0x4010586e // XFS_IOC_FSGROWFSDATA
)

type xfsGeometryV1 struct {
	blockSize  uint32
	_          [6]uint32
	maxPercent uint32 // of the space that inodes may take
	blocks     uint64
	_          [7]uint64
	_          [4]uint32
}

type xfsGrowth struct {
	blocks     uint64
	maxPercent uint32
	_          uint32
}

func (x xfs) geometry() (g xfsGeometryV1, err error) {
	if err := ioctl(x.dir, xfsGeometry, unsafe.Pointer(&g)); err != nil {
		return g, fmt.Errorf("geometry of xfs: %w", err)
	}
	return g, nil
}

func (x xfs) blocks() (count, size uint64, err error) {
	g, err := x.geometry()
	if err == nil && g.blockSize == 0 {
		err = errors.New("geometry of xfs: no block size")
	}
	return g.blocks, uint64(g.blockSize), err
}

func (x xfs) grow(blocks uint64) error {
	g, err := x.geometry()
	if err != nil {
		return err
	}
	if err := ioctl(x.dir, xfsGrowData, unsafe.Pointer(&xfsGrowth{blocks: blocks, maxPercent: g.maxPercent})); err != nil {
		return fmt.Errorf("grow xfs to %d blocks: %w", blocks, err)
	}
	return nil
}
