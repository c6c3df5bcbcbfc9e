package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// maxUserFile bounds what is read of a container's passwd and group.
const maxUserFile = 4 << 20

// resolveUser sets the ids of a process from names, or numbers, by the files of
// the container below root.
func resolveUser(to *specs.User, from *protocol.StringUser, root string) error {
	passwd, err := readInRoot(root, "etc/passwd")
	if err != nil {
		return err
	}
	group, err := readInRoot(root, "etc/group")
	if err != nil {
		return err
	}
	return lookUser(to, from, passwd, group)
}

// lookUser is resolveUser on the contents of the files.
func lookUser(to *specs.User, from *protocol.StringUser, passwd, group []byte) error {
	name := from.GetUid()
	if g := from.GetGid(); g != "" {
		name += ":" + g
	}
	u, err := user.GetExecUser(name, &user.ExecUser{}, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return invalid("user %q: %s", name, err)
	}
	groups := u.Sgids
	if extra := from.GetAdditionalGids(); len(extra) > 0 {
		gids, err := user.GetAdditionalGroups(extra, bytes.NewReader(group))
		if err != nil {
			return invalid("groups %q: %s", extra, err)
		}
		groups = append(groups, gids...)
	}
	to.UID, to.GID, to.AdditionalGids = uint32(u.Uid), uint32(u.Gid), nil
	for _, g := range groups {
		to.AdditionalGids = append(to.AdditionalGids, uint32(g))
	}
	return nil
}

// readInRoot reads a file of the container, whose links do not lead out of it.
// No file is an empty one.
func readInRoot(root, name string) ([]byte, error) {
	f, err := openInRoot(root, name, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxUserFile))
	if err != nil {
		return nil, fmt.Errorf("read %s of the container: %w", name, err)
	}
	return b, nil
}

// openInRoot opens a regular file below a directory. Links are resolved as if
// that were the root, if resolve lets them be.
func openInRoot(root, name string, resolve uint64) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolve,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, invalid("%s in the container is not a file", name)
	}
	return f, nil
}
