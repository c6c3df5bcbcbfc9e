package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// A watchable bind mount is a small directory of the host that a container
// watches with inotify. A share tells of no changes that the host makes, so the
// directory is copied into memory of the guest, and again when it has changed:
// each file and link by a rename, which inotify shows. What is not small, or not
// a directory, is bind-mounted, without events.

// Config maps and secrets have at most 1 MiB. While one is changed both
// generations are there, so a copy may grow beyond what it could begin with.
const (
	watchEntries, watchBytes = 128, 1 << 20
	watchGrowth              = 4
)

// watchInterval is how old a copy may become.
const watchInterval = time.Second

func mountWatched(ctx context.Context, m *mountRequest) (func() error, error) {
	if err := checkPath("source", m.GetSource()); err != nil {
		return nil, err
	}
	if isFile(m.GetSource()) {
		return mountBind(ctx, m)
	}
	source, err := os.OpenRoot(m.GetSource())
	if err != nil {
		return nil, err
	}
	tree, err := scanTree(source.FS(), watchEntries, watchBytes)
	if errors.Is(err, errTooBig) {
		source.Close()
		return mountBind(ctx, m)
	}
	if err != nil {
		source.Close()
		return nil, err
	}
	unmount, err := m.mount("tmpfs", "tmpfs", []string{"mode=0755", fmt.Sprintf("size=%d", 2*watchGrowth*watchBytes), "nosuid", "nodev"})
	if err != nil {
		source.Close()
		return nil, err
	}
	target, err := os.OpenRoot(m.GetMountPoint())
	if err != nil {
		source.Close()
		return unmount, err
	}
	c := &mirror{from: source, to: target}
	if err := c.apply(tree); err != nil {
		return func() error { return errors.Join(c.close(), unmount()) }, err
	}
	// Its end is not the request's.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.follow(life)
	}()
	return func() error {
		stop()
		<-done
		return errors.Join(c.close(), unmount())
	}, nil
}

// A mirror keeps a directory a copy of another one.
type mirror struct {
	from, to *os.Root
	have     map[string]entry // what was copied
}

// An entry is what tells whether a file, link or directory has changed.
type entry struct {
	mode     fs.FileMode
	uid, gid uint32
	size     int64
	modified time.Time
	inode    uint64
	link     string
}

func (c *mirror) close() error { return errors.Join(c.from.Close(), c.to.Close()) }

func (c *mirror) follow(ctx context.Context) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		tree, err := scanTree(c.from.FS(), watchGrowth*watchEntries, watchGrowth*watchBytes)
		if err == nil {
			err = c.apply(tree)
		}
		// Something that changes while it is read is seen by the next round.
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !failed {
			failed = true
			log.G(ctx).WithError(err).WithField("path", c.from.Name()).Warn("watched directory not copied")
		}
		failed = failed && err != nil
	}
}

var errTooBig = errors.New("too big to be watched")

// scanTree lists a directory, by path. Sockets and devices are left out.
func scanTree(dir fs.FS, maxEntries int, maxBytes int64) (map[string]entry, error) {
	tree := map[string]entry{}
	var bytes int64
	err := fs.WalkDir(dir, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := entry{mode: info.Mode(), modified: info.ModTime()}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			e.uid, e.gid, e.inode = st.Uid, st.Gid, st.Ino
		}
		switch {
		case info.IsDir():
			e.modified = time.Time{} // what is in it tells
		case info.Mode().IsRegular():
			e.size = info.Size()
		case info.Mode()&fs.ModeSymlink != 0:
			if e.link, err = fs.ReadLink(dir, name); err != nil {
				return err
			}
		default:
			return nil
		}
		tree[name] = e
		bytes += e.size
		if len(tree) > maxEntries || bytes > maxBytes {
			return errTooBig
		}
		return nil
	})
	return tree, err
}

// apply makes the copy what the tree says: directories and files, then links,
// which may point to them, then what is no more. So a link that is changed to
// another directory, which is how Kubernetes updates a volume, changes all files
// at once.
func (c *mirror) apply(tree map[string]entry) error {
	if c.have == nil {
		c.have = map[string]entry{}
	}
	names := slices.Sorted(maps.Keys(tree)) // parents first
	for _, links := range []bool{false, true} {
		for _, name := range names {
			e := tree[name]
			if isLink := e.mode&fs.ModeSymlink != 0; isLink != links || c.have[name] == e {
				continue
			}
			if err := c.put(name, e); err != nil {
				return err
			}
			c.have[name] = e
		}
	}
	var gone []string
	for name := range c.have {
		if _, ok := tree[name]; !ok {
			gone = append(gone, name)
		}
	}
	slices.Sort(gone)
	for _, name := range slices.Backward(gone) { // what is in a directory first
		// Its directory may have become a file.
		if err := c.to.RemoveAll(name); err != nil && !errors.Is(err, unix.ENOTDIR) {
			return err
		}
		delete(c.have, name)
	}
	return nil
}

func (c *mirror) put(name string, e entry) error {
	if old, ok := c.have[name]; ok && old.mode.IsDir() != e.mode.IsDir() {
		if err := c.to.RemoveAll(name); err != nil {
			return err
		}
	}
	if e.mode.IsDir() {
		if err := c.to.MkdirAll(name, 0o755); err != nil {
			return err
		}
		return errors.Join(c.to.Chown(name, int(e.uid), int(e.gid)), c.to.Chmod(name, permissions(e.mode)))
	}
	if strings.HasSuffix(name, partial) {
		return nil // somebody else is copying, too
	}
	temp := name + partial
	if err := c.to.RemoveAll(temp); err != nil {
		return err
	}
	err := c.copy(name, temp, e)
	if err == nil {
		err = c.to.Lchown(temp, int(e.uid), int(e.gid))
	}
	if err == nil && e.link == "" { // after its owner, which takes set-id bits away
		err = c.to.Chmod(temp, permissions(e.mode))
	}
	if err == nil {
		err = c.to.Rename(temp, name)
	}
	if err != nil {
		_ = c.to.RemoveAll(temp)
	}
	return err
}

func (c *mirror) copy(name, temp string, e entry) error {
	if e.link != "" {
		return c.to.Symlink(e.link, temp)
	}
	// It may have become a pipe, or a link.
	from, err := c.from.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := c.to.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, io.LimitReader(from, watchGrowth*watchBytes))
	return errors.Join(err, to.Close())
}

// permissions are what the copy gets: not whose the file runs as.
func permissions(mode fs.FileMode) fs.FileMode { return mode & (fs.ModePerm | fs.ModeSticky) }
