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
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, invalid("%s in the container is not a file", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxUserFile))
	if err != nil {
		return nil, fmt.Errorf("read %s of the container: %w", name, err)
	}
	return b, nil
}
