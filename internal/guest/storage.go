package guest

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// A storage is what the host asks to have mounted: a driver's name says what the
// source is. The drivers are in drivers.go, one function each.

// A mounter mounts one storage and returns what undoes that.
type mounter func(ctx context.Context, m *mountRequest) (undo func() error, err error)

// mounters are the drivers of this agent. To add one, write its function and put
// it here: GetGuestDetails announces it.
var mounters = map[string]mounter{
	"virtio-fs": mountVirtioFS,
	"blk":       mountBlock,
	"mmioblk":   mountBlock,
	"nvdimm":    mountBlock,
	"ephemeral": mountEphemeral,
	"local":     makeLocal,
	"overlayfs": mountOverlay,
	"bind":      mountBind,
}

// storages are those that are mounted, by mount point. Containers may share one:
// it is unmounted when the last of them is gone.
type storages struct {
	cfg Config

	mu      sync.Mutex
	entries map[string]*storageEntry // guarded by mu
}

type storageEntry struct {
	users int           // guarded by storages.mu
	ready chan struct{} // closed when the fields below are set
	err   error
	undo  func() error
}

func newStorages(cfg Config) *storages {
	return &storages{cfg: cfg, entries: map[string]*storageEntry{}}
}

// add mounts a storage for a container, or for the sandbox when that is "". The
// function that it returns takes the use back.
func (s *storages) add(ctx context.Context, storage *protocol.Storage, containerID string) (release func() error, err error) {
	mount := mounters[storage.GetDriver()]
	if mount == nil {
		return nil, fmt.Errorf("storage driver %q: %w", storage.GetDriver(), errdefs.ErrNotImplemented)
	}
	rel, err := below("mount point", s.cfg.Root, storage.GetMountPoint())
	if err != nil {
		return nil, err
	}
	entry, first := s.claim(rel)
	if first {
		entry.undo, entry.err = mount(ctx, &mountRequest{Storage: storage, root: s.cfg.Root, rel: rel, containerID: containerID})
		if entry.err == nil {
			entry.err = applyGroup(s.cfg.Root, rel, storage.GetFsGroup())
		}
		close(entry.ready)
	}
	release = func() error { return s.release(rel, entry) }
	select {
	case <-entry.ready:
	case <-ctx.Done():
		_ = release()
		return nil, ctx.Err()
	}
	if entry.err != nil {
		_ = release()
		return nil, fmt.Errorf("mount storage %s %q at %s: %w", storage.GetDriver(), storage.GetSource(), storage.GetMountPoint(), entry.err)
	}
	return release, nil
}

func (s *storages) claim(mountPoint string) (entry *storageEntry, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entry = s.entries[mountPoint]
	if entry == nil {
		entry = &storageEntry{ready: make(chan struct{})}
		s.entries[mountPoint] = entry
		first = true
	}
	entry.users++
	return entry, first
}

func (s *storages) release(mountPoint string, entry *storageEntry) error {
	s.mu.Lock()
	entry.users--
	last := entry.users == 0
	if last && s.entries[mountPoint] == entry {
		delete(s.entries, mountPoint)
	}
	s.mu.Unlock()
	if last && entry.undo != nil {
		return entry.undo()
	}
	return nil
}
