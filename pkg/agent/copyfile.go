package agent

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

const (
	copyPiece  = 1 << 20 // bytes of a file in one call
	parentMode = 0o750   // of directories that the guest has to make on the way
)

// CopyFile implements Guest. Directories are copied with everything in them,
// links as links; modes and owners are kept.
func (c *Client) CopyFile(ctx context.Context, src, dst string) error {
	p := c.peer.Load()
	err := filepath.WalkDir(src, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, name)
		if err != nil {
			return err
		}
		return p.copyOne(ctx, name, path.Join(dst, filepath.ToSlash(rel)))
	})
	if err != nil {
		return fmt.Errorf("copy %q to guest: %w", src, err)
	}
	return nil
}

// copyOne copies a file, a link, or a directory without its entries.
func (p *peer) copyOne(ctx context.Context, src, dst string) error {
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: src, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return p.copyRegular(ctx, src, dst)
	case unix.S_IFDIR:
		return tell(ctx, p, service.CopyFile, copyRequest(dst, &st))
	case unix.S_IFLNK:
		target, err := os.Readlink(src)
		if err != nil {
			return err
		}
		req := copyRequest(dst, &st)
		req.FileSize, req.Data = int64(len(target)), []byte(target)
		return tell(ctx, p, service.CopyFile, req)
	default:
		return fmt.Errorf("%q is no file, directory or link: %w", src, errdefs.ErrInvalidArgument)
	}
}

// copyRegular sends a file piece by piece; the guest shows it when it has the
// last one. An empty file is one empty piece.
func (p *peer) copyRegular(ctx context.Context, src, dst string) error {
	// What was a file a moment ago may be a link or a fifo now.
	f, err := os.OpenFile(src, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &fs.PathError{Op: "fstat", Path: src, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("%q is no file any more: %w", src, errdefs.ErrFailedPrecondition)
	}
	piece := make([]byte, min(st.Size, copyPiece))
	for offset := int64(0); ; {
		piece = piece[:min(st.Size-offset, copyPiece)]
		if _, err := io.ReadFull(f, piece); err != nil {
			return fmt.Errorf("read %q at %d of %d: %w", src, offset, st.Size, err)
		}
		req := copyRequest(dst, &st)
		req.FileSize, req.Offset, req.Data = st.Size, offset, piece
		if err := tell(ctx, p, service.CopyFile, req); err != nil {
			return err
		}
		if offset += int64(len(piece)); offset == st.Size {
			return nil
		}
	}
}

func copyRequest(dst string, st *unix.Stat_t) *protocol.CopyFileRequest {
	return &protocol.CopyFileRequest{
		Path:     dst,
		FileMode: st.Mode,
		DirMode:  parentMode,
		Uid:      int32(st.Uid),
		Gid:      int32(st.Gid),
	}
}
