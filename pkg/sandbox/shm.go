package sandbox

import (
	"path"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/storage"
)

// defaultShm is the size of /dev/shm that engines give whoever does not ask.
const defaultShm = 64 << 20

// shmSize is the size in bytes of the /dev/shm that the specification of a
// sandbox's first container asks for: by a file system that was mounted on the
// host for it, or by an option.
func shmSize(spec *specs.Spec) uint64 {
	for _, m := range spec.Mounts {
		if path.Clean(m.Destination) != "/dev/shm" {
			continue
		}
		var fs unix.Statfs_t
		if m.Type == "bind" && unix.Statfs(m.Source, &fs) == nil && fs.Type == unix.TMPFS_MAGIC {
			if path.Clean(m.Source) == "/dev/shm" || fs.Blocks == 0 {
				break // the host's own, or one without a limit
			}
			return fs.Blocks * uint64(fs.Bsize)
		}
		for _, o := range m.Options {
			if text, ok := strings.CutPrefix(o, "size="); ok && m.Type == "tmpfs" {
				if n, ok := parseSize(text); ok {
					return n
				}
			}
		}
	}
	return defaultShm
}

// parseSize reads a size as tmpfs(5) does: with k, m or g behind it.
func parseSize(text string) (n uint64, ok bool) {
	shift := 0
	if i := len(text) - 1; i > 0 {
		switch text[i] | 0x20 {
		case 'k':
			shift = 10
		case 'm':
			shift = 20
		case 'g':
			shift = 30
		}
		if shift > 0 {
			text = text[:i]
		}
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n == 0 || n > 1<<50>>shift {
		return 0, false
	}
	return n << shift, true
}

// shmSource is what is bound at /dev/shm in the specification that stands for a
// pod: the same in that of a container means the pod's.
func shmSource(spec *specs.Spec) string {
	for _, m := range spec.Mounts {
		if path.Clean(m.Destination) == "/dev/shm" && m.Type == "bind" {
			return path.Clean(m.Source)
		}
	}
	return storage.GuestShm
}
