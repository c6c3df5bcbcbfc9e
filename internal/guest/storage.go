package guest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// A storage is what the host asks to have mounted: a driver's name says what the
// source is. The drivers are in drivers.go, one function each.

// A mounter mounts one storage and returns what undoes that.
type mounter func(ctx context.Context, m *mountRequest) (undo func() error, err error)

// mounters are the drivers of this agent. To add one, write its function and put
// it here: GetGuestDetails announces it.
var mounters = map[string]mounter{
	"virtio-fs":      mountVirtioFS,
	"blk":            mountBlock,
	"mmioblk":        mountBlock,
	"nvdimm":         mountBlock,
	"scsi":           mountSCSI,
	"ephemeral":      mountEphemeral,
	localDriver:      makeLocal,
	"overlayfs":      mountOverlay,
	"bind":           mountBind,
	"watchable-bind": mountWatched,
}

// What is in a local directory outlives the containers that use it: they may
// come again.
const localDriver = "local"

// storages are those that are mounted, by mount point. Containers may share one:
// it is unmounted when the last of them is gone, or with the sandbox when it is
// kept.
type storages struct {
	cfg       Config
	devices   *devices
	hugePages lock // held while their number changes

	mu      sync.Mutex
	entries map[string]*storageEntry // guarded by mu
}

type storageEntry struct {
	driver, source string
	users          int           // guarded by storages.mu
	kept           bool          // to the sandbox' end; guarded by storages.mu
	ready          chan struct{} // closed when the fields below are set
	err            error
	undo           func() error
	gone           chan struct{} // closed when it is undone
}

func newStorages(cfg Config, d *devices) *storages {
	return &storages{cfg: cfg, devices: d, hugePages: newLock(), entries: map[string]*storageEntry{}}
}

// add mounts a storage for a container, or for the sandbox when that is "". The
// function that it returns takes the use back.
func (s *storages) add(ctx context.Context, storage *protocol.Storage, containerID string) (release func() error, err error) {
	mount := mounters[storage.GetDriver()]
	if mount == nil {
		return nil, notImplemented("storage driver " + bound(storage.GetDriver(), 64))
	}
	rel, err := below("mount point", s.cfg.Root, storage.GetMountPoint())
	if err != nil {
		return nil, err
	}
	entry, first, err := s.claim(ctx, rel, storage)
	if err != nil {
		return nil, err
	}
	if first {
		entry.undo, entry.err = mount(ctx, &mountRequest{Storage: storage, storages: s, root: s.cfg.Root, rel: rel, containerID: containerID})
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
		err := fmt.Errorf("mount storage %s %q at %s: %w", storage.GetDriver(), storage.GetSource(), storage.GetMountPoint(), entry.err)
		return nil, errors.Join(err, release())
	}
	if containerID != "" && (storage.GetShared() || storage.GetDriver() == localDriver) {
		s.mu.Lock()
		entry.kept = true
		s.mu.Unlock()
	}
	return release, nil
}

// claim makes the entry of a mount point, or uses the one that is there. One
// that is being undone is waited for.
func (s *storages) claim(ctx context.Context, mountPoint string, storage *protocol.Storage) (entry *storageEntry, first bool, err error) {
	for {
		entry, first, gone := s.tryClaim(mountPoint, storage)
		switch {
		case gone != nil:
			select {
			case <-gone:
				continue
			case <-ctx.Done():
				return nil, false, fmt.Errorf("wait for storage at %s to be unmounted: %w", storage.GetMountPoint(), ctx.Err())
			}
		case entry == nil:
			return nil, false, invalid("storage at %s is another one already", storage.GetMountPoint())
		}
		return entry, first, nil
	}
}

func (s *storages) tryClaim(mountPoint string, storage *protocol.Storage) (entry *storageEntry, first bool, gone chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entry = s.entries[mountPoint]
	switch {
	case entry == nil:
		entry = &storageEntry{
			driver: storage.GetDriver(), source: storage.GetSource(), users: 1,
			ready: make(chan struct{}), gone: make(chan struct{}),
		}
		s.entries[mountPoint] = entry
		return entry, true, nil
	case entry.users == 0 && !entry.kept:
		return nil, false, entry.gone
	case entry.driver != storage.GetDriver() || entry.source != storage.GetSource():
		return nil, false, nil
	}
	entry.users++
	return entry, false, nil
}

func (s *storages) release(mountPoint string, entry *storageEntry) error {
	s.mu.Lock()
	entry.users--
	last := entry.users == 0 && !entry.kept
	s.mu.Unlock()
	if !last {
		return nil
	}
	return s.undo(mountPoint, entry)
}

func (s *storages) undo(mountPoint string, entry *storageEntry) error {
	var err error
	if entry.undo != nil {
		err = entry.undo()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.entries, mountPoint)
	close(entry.gone)
	return err
}

// close undoes what was kept. Nobody uses it any more.
func (s *storages) close() error {
	s.mu.Lock()
	kept := map[string]*storageEntry{}
	for mountPoint, entry := range s.entries {
		if entry.kept && entry.users == 0 {
			entry.kept = false
			kept[mountPoint] = entry
		}
	}
	s.mu.Unlock()
	var errs []error
	// What is mounted below another one goes first.
	for _, mountPoint := range slices.Backward(slices.Sorted(maps.Keys(kept))) {
		errs = append(errs, s.undo(mountPoint, kept[mountPoint]))
	}
	return errors.Join(errs...)
}

// find is the entry of a mount point; nil if nothing is mounted there by us.
func (s *storages) find(mountPoint string) *storageEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entries[mountPoint]
}
