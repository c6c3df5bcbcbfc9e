package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// partial is behind the name of a file that has not arrived completely.
const partial = ".vmshim-partial"

// CopyFile implements the protocol: a directory, a link, or a piece of a file,
// below the share and through no link out of it.
func (s *service) CopyFile(_ context.Context, req *protocol.CopyFileRequest) (*emptypb.Empty, error) {
	rel, err := below("path", s.cfg.shareDir(), req.GetPath())
	if err != nil {
		return nil, err
	}
	size, end := req.GetFileSize(), req.GetOffset()+int64(len(req.GetData()))
	if size < 0 || req.GetOffset() < 0 || end < 0 {
		return nil, invalid("file of %d bytes, piece at %d", size, req.GetOffset())
	}
	root, err := os.OpenRoot(s.cfg.shareDir())
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := root.MkdirAll(filepath.Dir(rel), dirMode(req)); err != nil {
		return nil, fmt.Errorf("copy file: %w", err)
	}
	switch req.GetFileMode() & unix.S_IFMT {
	case unix.S_IFDIR:
		err = copyDir(root, rel, req)
	case unix.S_IFLNK:
		err = copyLink(root, rel, req)
	case unix.S_IFREG, 0:
		if end > size {
			return nil, invalid("piece up to %d of a file of %d bytes", end, size)
		}
		err = copyPiece(root, rel, req, end == size)
	default:
		return nil, invalid("file type %#o", req.GetFileMode()&unix.S_IFMT)
	}
	if err != nil {
		return nil, fmt.Errorf("copy file: %w", err)
	}
	return &emptypb.Empty{}, nil
}

func dirMode(req *protocol.CopyFileRequest) fs.FileMode {
	if m := fs.FileMode(req.GetDirMode()).Perm(); m != 0 {
		return m
	}
	return 0o755
}

func copyDir(root *os.Root, rel string, req *protocol.CopyFileRequest) error {
	if err := root.Mkdir(rel, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return setOwner(root, rel, req)
}

func copyLink(root *os.Root, rel string, req *protocol.CopyFileRequest) error {
	if err := root.Remove(rel); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := root.Symlink(string(req.GetData()), rel); err != nil {
		return err
	}
	return root.Lchown(rel, int(req.GetUid()), int(req.GetGid()))
}

// copyPiece writes one piece; the last one makes the file appear.
func copyPiece(root *os.Root, rel string, req *protocol.CopyFileRequest, last bool) error {
	temp := rel + partial
	flags := os.O_WRONLY | os.O_CREATE
	if req.GetOffset() == 0 {
		flags |= os.O_TRUNC
	}
	f, err := root.OpenFile(temp, flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(req.GetData(), req.GetOffset())
	if err := errors.Join(err, f.Close()); err != nil || !last {
		return err
	}
	if err := setOwner(root, temp, req); err != nil {
		return err
	}
	return root.Rename(temp, rel)
}

func setOwner(root *os.Root, rel string, req *protocol.CopyFileRequest) error {
	if err := root.Lchown(rel, int(req.GetUid()), int(req.GetGid())); err != nil {
		return err
	}
	mode := fs.FileMode(req.GetFileMode()).Perm()
	for bit, flag := range map[uint32]fs.FileMode{
		unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky,
	} {
		if req.GetFileMode()&bit != 0 {
			mode |= flag
		}
	}
	return root.Chmod(rel, mode)
}
