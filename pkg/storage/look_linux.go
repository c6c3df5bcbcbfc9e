package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Look gathers the facts for a plan.
func Look(share string, c Container) (Facts, error) {
	f := Facts{
		Share: share, Modes: map[string]fs.FileMode{}, Submounts: map[string]bool{}, HugePages: map[string]uint64{}, Setattr: setattr(),
	}
	var sources []string
	if len(c.Rootfs) == 0 && c.Root != nil {
		sources = append(sources, absolute(c.Bundle, c.Root.Path))
	}
	for _, m := range c.Mounts {
		if source := absolute(c.Bundle, m.Source); isBind(m) && !kernelPath(source) {
			sources = append(sources, source)
		}
	}
	for _, source := range sources {
		info, err := os.Stat(source)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Facts{}, fmt.Errorf("look at mounts: %w", err)
		}
		f.Modes[source] = info.Mode()
		var on unix.Statfs_t
		if info.IsDir() && unix.Statfs(source, &on) == nil && on.Type == unix.HUGETLBFS_MAGIC {
			f.HugePages[source] = uint64(on.Bsize)
		}
	}
	return f, f.findSubmounts(sources)
}

// findSubmounts looks for mounts below the sources that are directories.
func (f Facts) findSubmounts(sources []string) error {
	sources = slices.DeleteFunc(slices.Clone(sources), func(s string) bool { return !f.Modes[s].IsDir() })
	if len(sources) == 0 {
		return nil
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return fmt.Errorf("look at mounts: %w", err)
	}
	for _, source := range sources {
		dir, err := filepath.EvalSymlinks(source)
		if err != nil {
			return fmt.Errorf("look at mounts: %w", err)
		}
		prefix := strings.TrimSuffix(dir, "/") + "/"
		f.Submounts[source] = slices.ContainsFunc(mounts, func(m *mountinfo.Info) bool { return strings.HasPrefix(m.Mountpoint, prefix) })
	}
	return nil
}

// setattr asks the kernel with a call that changes nothing.
func setattr() bool { return unix.MountSetattr(-1, "", 0, &unix.MountAttr{}) == nil }
