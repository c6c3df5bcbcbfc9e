package agent

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func TestCopyFile(t *testing.T) {
	dir := t.TempDir()
	big := random(2*copyPiece + 5)
	write := func(name string, data []byte, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), data, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o711); err != nil {
		t.Fatal(err)
	}
	write("big", big, 0o640)
	write("empty", nil, 0o600)
	write("exact", big[:copyPiece], 0o755)
	write("sub/file", []byte("x"), 0o644)
	if err := os.Symlink("../../outside", filepath.Join(dir, "sub/link")); err != nil {
		t.Fatal(err)
	}

	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	if err := c.CopyFile(within(t, 10*time.Second), dir, "/guest/dir"); err != nil {
		t.Fatal(err)
	}
	type sent struct {
		Mode   uint32
		Size   int64
		Pieces []int
	}
	got := map[string]sent{}
	content := map[string][]byte{}
	for _, call := range peer.Calls("CopyFile") {
		req := call.Request.(*protocol.CopyFileRequest)
		s := got[req.GetPath()]
		if int(req.GetOffset()) != len(content[req.GetPath()]) {
			t.Errorf("%s: piece at %d, want it at %d", req.GetPath(), req.GetOffset(), len(content[req.GetPath()]))
		}
		if req.GetUid() != int32(os.Getuid()) || req.GetGid() != int32(os.Getgid()) || req.GetDirMode() != parentMode {
			t.Errorf("%s: got owner %d:%d, directory mode %o", req.GetPath(), req.GetUid(), req.GetGid(), req.GetDirMode())
		}
		got[req.GetPath()] = sent{req.GetFileMode(), req.GetFileSize(), append(s.Pieces, len(req.GetData()))}
		content[req.GetPath()] = append(content[req.GetPath()], req.GetData()...)
	}
	want := map[string]sent{
		"/guest/dir":          {unix.S_IFDIR | 0o755, 0, []int{0}},
		"/guest/dir/big":      {unix.S_IFREG | 0o640, int64(len(big)), []int{copyPiece, copyPiece, 5}},
		"/guest/dir/empty":    {unix.S_IFREG | 0o600, 0, []int{0}},
		"/guest/dir/exact":    {unix.S_IFREG | 0o755, copyPiece, []int{copyPiece}},
		"/guest/dir/sub":      {unix.S_IFDIR | 0o711, 0, []int{0}},
		"/guest/dir/sub/file": {unix.S_IFREG | 0o644, 1, []int{1}},
		"/guest/dir/sub/link": {unix.S_IFLNK | 0o777, 13, []int{13}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sent (-want +got):\n%s", diff)
	}
	if !bytes.Equal(content["/guest/dir/big"], big) || string(content["/guest/dir/sub/link"]) != "../../outside" {
		t.Error("the bytes differ")
	}

	if err := c.CopyFile(within(t, 10*time.Second), filepath.Join(dir, "sub/file"), "/guest/one"); err != nil {
		t.Fatal(err)
	}
	calls := peer.Calls("CopyFile")
	if p := calls[len(calls)-1].Request.(*protocol.CopyFileRequest).GetPath(); p != "/guest/one" {
		t.Errorf("got path %q", p)
	}
}

func TestCopyFileErrors(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)
	wantClass(t, c.CopyFile(ctx, fifo, "/x"), errdefs.ErrInvalidArgument)
	wantClass(t, c.CopyFile(ctx, filepath.Join(dir, "missing"), "/x"), os.ErrNotExist)
	peer.Handle("CopyFile", func(context.Context, proto.Message) (proto.Message, error) {
		return nil, errdefs.ErrPermissionDenied
	})
	wantClass(t, c.CopyFile(ctx, file, "/../x"), errdefs.ErrPermissionDenied)
}
