package guest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// FuzzCopyFile: two requests, of which the first may lay a link for the second,
// change nothing outside the share, and links stay what they were, dangling or not.
// In names and targets, OUT stands for a directory beside the share.
func FuzzCopyFile(f *testing.F) {
	for _, s := range []struct {
		first, second, target string
		mode                  uint32
	}{
		{"l", "l/f", "OUT", unix.S_IFREG | 0o644},
		{"l", "l", "OUT/secret", unix.S_IFREG | 0o4755},
		{"l", "l", "OUT", unix.S_IFDIR | 0o777},
		{"a/l", "a/l/../f", "../../../outside", unix.S_IFREG | 0o644},
		{"l", "l/l/l", "l", unix.S_IFREG | 0o644},
		{"l.vmshim-partial", "l", "OUT/secret", unix.S_IFREG | 0o644},
		{"d/l", "d", "nowhere", unix.S_IFLNK | 0o777},
		{"../../outside/x", "OUT/x", "", unix.S_IFREG | 0o644},
		{"l", "l/secret", "/proc/self/root/OUT", unix.S_IFLNK | 0o777},
		{"l", "l/n", "OUT/missing", unix.S_IFDIR | 0o700},
	} {
		f.Add(s.first, s.second, s.target, s.mode)
	}
	f.Fuzz(func(t *testing.T, first, second, target string, mode uint32) {
		dir := t.TempDir()
		s := &service{cfg: Config{Root: filepath.Join(dir, "root")}}
		share, out := s.cfg.shareDir(), filepath.Join(dir, "outside")
		for _, d := range []string{share, out} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(out, "secret"), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
		before := outside(t, dir, share)
		fill := func(s string) string { return strings.ReplaceAll(s, "OUT", out) }
		send := func(name string, mode uint32, data string) error {
			_, err := s.CopyFile(t.Context(), &protocol.CopyFileRequest{
				Path: share + "/" + fill(name), FileMode: mode, FileSize: int64(len(data)), Data: []byte(data),
				Uid: int32(os.Getuid()), Gid: int32(os.Getgid()),
			})
			return err
		}
		to := fill(target)
		if send(first, unix.S_IFLNK|0o777, to) == nil {
			if got, err := os.Readlink(filepath.Join(share, fill(first))); err != nil || got != to {
				t.Errorf("link %q to %q is one to %q, %v", first, to, got, err)
			}
		}
		_ = send(second, mode, "data")
		if after := outside(t, dir, share); after != before {
			t.Errorf("%q, %q, %q, %#o changed what is outside:\n%swas\n%s", first, second, target, mode, after, before)
		}
	})
}

// outside describes all that is below dir and not below share.
func outside(t *testing.T, dir, share string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if path == share { // its own mode may change
			return fs.SkipDir
		}
		content := ""
		if info.Mode().IsRegular() {
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = string(raw)
		}
		fmt.Fprintf(&b, "%s %v %q\n", path, info.Mode(), content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
