package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// Volumes: file systems that are mounted already.

// GetVolumeStats implements the protocol.
func (s *service) GetVolumeStats(_ context.Context, req *protocol.VolumeStatsRequest) (*protocol.VolumeStatsResponse, error) {
	path := req.GetVolumeGuestPath()
	if err := checkPath("volume", path); err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	size := uint64(st.Bsize)
	return &protocol.VolumeStatsResponse{
		Usage: []*protocol.VolumeUsage{
			{
				Unit:  protocol.VolumeUsage_BYTES,
				Total: st.Blocks * size, Used: (st.Blocks - st.Bfree) * size, Available: st.Bavail * size,
			},
			{Unit: protocol.VolumeUsage_INODES, Total: st.Files, Used: st.Files - st.Ffree, Available: st.Ffree},
		},
		VolumeCondition: &protocol.VolumeCondition{},
	}, nil
}

// UpdateEphemeralMounts implements the protocol: memory that is mounted gets
// another size, which the rest of the request says nothing about.
func (s *service) UpdateEphemeralMounts(_ context.Context, req *protocol.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	for _, storage := range req.GetStorages() {
		if err := s.sandbox.storages.resize(storage); err != nil {
			return nil, fmt.Errorf("update mount at %q: %w", bound(storage.GetMountPoint(), 512), err)
		}
	}
	return &emptypb.Empty{}, nil
}

// sizeOptions are the options of a tmpfs that can be changed later.
var sizeOptions = []string{"size", "nr_blocks", "nr_inodes"}

// resize changes the size of a tmpfs that is mounted. Its other options stay.
func (s *storages) resize(storage *protocol.Storage) error {
	rel, err := below("mount point", s.cfg.Root, storage.GetMountPoint())
	if err != nil {
		return err
	}
	entry := s.find(rel)
	if entry == nil {
		return notFound("storage")
	}
	if storage.GetDriver() != "ephemeral" || entry.driver != "ephemeral" {
		return invalid("storage of driver %q, mounted by %q", bound(storage.GetDriver(), 64), entry.driver)
	}
	fd, err := unix.Fspick(unix.AT_FDCWD, filepath.Join(s.cfg.Root, rel), unix.FSPICK_CLOEXEC|unix.FSPICK_SYMLINK_NOFOLLOW|unix.FSPICK_NO_AUTOMOUNT)
	if err != nil {
		return fmt.Errorf("pick file system: %w", err)
	}
	defer unix.Close(fd)
	for _, list := range storage.GetOptions() {
		for o := range strings.SplitSeq(list, ",") {
			key, value, _ := strings.Cut(o, "=")
			if !slices.Contains(sizeOptions, key) {
				continue
			}
			if err := unix.FsconfigSetString(fd, key, value); err != nil {
				return invalid("option %q: %s", bound(o, 64), err)
			}
		}
	}
	err = unix.FsconfigReconfigure(fd)
	if errors.Is(err, unix.EINVAL) {
		return precondition("more is used than fits")
	}
	return err
}

// RemoveStaleVirtiofsShareMounts implements the protocol. The guest mounts what
// is mounted below a share on the host when it first sees it; such a mount is
// stale when the host has another thing there now, or nothing.
func (s *service) RemoveStaleVirtiofsShareMounts(ctx context.Context, _ *protocol.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	share := s.cfg.shareDir()
	var errs []error
	for _, m := range slices.Backward(virtiofsMounts(string(table))) { // the newest is on top
		rel, err := filepath.Rel(s.cfg.Root, m.path)
		if err != nil || !strings.HasPrefix(m.path, share+"/") || s.sandbox.storages.find(rel) != nil {
			continue
		}
		if ctx.Err() != nil {
			errs = append(errs, ctx.Err())
			break
		}
		if m.isStale() {
			errs = append(errs, m.remove())
		}
	}
	return &emptypb.Empty{}, errors.Join(errs...)
}

// A submount is a line of mountinfo(5).
type submount struct {
	path         string
	major, minor uint32
}

func virtiofsMounts(table string) []submount {
	var mounts []submount
	for line := range strings.Lines(table) {
		fields, fs, ok := strings.Cut(line, " - ")
		f := strings.Fields(fields)
		if !ok || len(f) < 6 || !strings.HasPrefix(fs, "virtiofs ") {
			continue
		}
		major, minor, _ := strings.Cut(f[2], ":")
		a, err := strconv.ParseUint(major, 10, 32)
		b, err2 := strconv.ParseUint(minor, 10, 32)
		if err != nil || err2 != nil {
			continue
		}
		mounts = append(mounts, submount{unescape(f[4]), uint32(a), uint32(b)})
	}
	return mounts
}

// unescape undoes what mountinfo does to blanks and backslashes: three octal
// digits.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// askHost looks a name of a share up anew: a plain lookup trusts what it found a
// moment ago. One for a new name always asks (LOOKUP_EXCL in fuse_dentry_revalidate,
// fs/fuse/dir.c), and RENAME_NOREPLACE from a name to itself changes nothing: EEXIST
// if it is there.
func askHost(path string) {
	_ = unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
}

// isStale asks the host: for the name, which makes the kernel drop a mount on one
// that means something else now, and then for the root of the mount.
func (m submount) isStale() bool {
	askHost(m.path)
	var st unix.Stat_t
	if err := unix.Lstat(m.path, &st); err != nil {
		return true
	}
	return unix.Major(st.Dev) != m.major || unix.Minor(st.Dev) != m.minor
}

// remove takes it away. Its users keep it.
func (m submount) remove() error {
	err := unmount(m.path)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil // the kernel was faster
	}
	return err
}
