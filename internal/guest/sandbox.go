package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// destroyTimeout bounds how long DestroySandbox waits for containers that hang:
// the machine goes away anyway.
const destroyTimeout = 10 * time.Second

// A sandbox is all that the machine serves: there is one.
type sandbox struct {
	cfg      Config
	watcher  *watcher
	oom      *oomQueue
	devices  *devices
	storages *storages
	network  *network

	setup lock          // held by CreateSandbox and DestroySandbox
	undo  cleanup.Stack // what CreateSandbox did; guarded by setup

	pids     lock      // held while the shared pid namespace is made or joined
	pidOwner *pidOwner // nil: nobody wanted it yet; guarded by pids

	hotplug      lock // held while CPUs and memory come online
	memoryBlocks int  // how many there were; guarded by hotplug

	mu         sync.Mutex
	id         string                // guarded by mu
	net        *namespace            // the network's; guarded by mu
	pinned     *pinned               // guarded by mu; nil: there is no sandbox
	hooks      configs.Hooks         // of the guest, for every container; guarded by mu
	containers map[string]*container // guarded by mu
	closing    bool                  // guarded by mu

	destroyed chan struct{} // closed when DestroySandbox is done
}

func newSandbox(cfg Config, w *watcher, u *uevents) *sandbox {
	d := newDevices(cfg.HotplugTimeout, u)
	blocks, _ := filepath.Glob(filepath.Join(d.memory(), "memory[0-9]*")) // the pattern is right
	return &sandbox{
		cfg: cfg, watcher: w, oom: newOOMQueue(), devices: d, storages: newStorages(cfg, d),
		network: newNetwork(d), setup: newLock(), pids: newLock(), hotplug: newLock(), memoryBlocks: len(blocks),
		containers: map[string]*container{}, destroyed: make(chan struct{}),
	}
}

// CreateSandbox implements the protocol.
func (s *service) CreateSandbox(ctx context.Context, req *protocol.CreateSandboxRequest) (*emptypb.Empty, error) {
	if err := checkSandbox(req); err != nil {
		return nil, err
	}
	b := s.sandbox
	if err := b.setup.acquire(ctx); err != nil {
		return nil, err
	}
	defer b.setup.release()
	return &emptypb.Empty{}, b.create(ctx, req)
}

func checkSandbox(req *protocol.CreateSandboxRequest) error {
	if id := req.GetSandboxId(); id != "" {
		if err := checkID("sandbox id", id); err != nil {
			return err
		}
	}
	if len(req.GetHostname()) > 64 || strings.ContainsRune(req.GetHostname(), 0) {
		return invalid("hostname %q", bound(req.GetHostname(), 128))
	}
	if path := req.GetGuestHookPath(); path != "" {
		if err := checkPath("guest hooks", path); err != nil {
			return err
		}
	}
	for _, line := range req.GetDns() {
		if len(line) > 4096 {
			return invalid("dns line of %d bytes", len(line))
		}
	}
	return nil
}

// create makes the sandbox, or nothing. The caller holds setup.
func (b *sandbox) create(ctx context.Context, req *protocol.CreateSandboxRequest) (err error) {
	b.mu.Lock()
	exists, closing := b.pinned != nil, b.closing
	b.mu.Unlock()
	if closing {
		return precondition("the sandbox is being destroyed")
	}
	if exists {
		return fmt.Errorf("sandbox: %w", errdefs.ErrAlreadyExists)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.undo.Run())
		}
	}()
	if err := b.loadModules(ctx, req.GetKernelModules()); err != nil {
		return err
	}
	for _, dir := range []string{b.cfg.shareDir(), b.cfg.sandboxDir(), b.cfg.stateDir()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	net, err := b.network.pin()
	if err != nil {
		return err
	}
	pins, err := pinNamespaces(req.GetHostname())
	if err != nil {
		return err
	}
	b.undo.Add(pins.close)
	for _, storage := range req.GetStorages() {
		release, err := b.storages.add(ctx, storage, "")
		if err != nil {
			return err
		}
		b.undo.Add(release)
	}
	b.undo.Add(b.storages.close) // before those: it may be on them
	hooks, err := findHooks(req.GetGuestHookPath())
	if err != nil {
		return err
	}
	if err := b.writeDNS(req.GetDns()); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.id, b.net, b.pinned, b.hooks = req.GetSandboxId(), net, pins, hooks
	return nil
}

func (b *sandbox) loadModules(ctx context.Context, modules []*protocol.KernelModule) error {
	for _, m := range modules {
		if b.cfg.LoadModule == nil {
			return precondition("this guest loads no kernel modules")
		}
		if err := checkID("kernel module", m.GetName()); err != nil {
			return err
		}
		if err := b.cfg.LoadModule(ctx, m.GetName(), m.GetParameters()); err != nil {
			return fmt.Errorf("load module %s: %w", m.GetName(), err)
		}
	}
	return nil
}

// writeDNS makes the guest itself resolve names; containers get files of theirs.
func (b *sandbox) writeDNS(lines []string) error {
	if len(lines) == 0 {
		return nil
	}
	const target = "/etc/resolv.conf"
	path := filepath.Join(b.cfg.sandboxDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(path, target, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind", Path: target, Err: err}
	}
	b.undo.Add(func() error { return unix.Unmount(target, unix.MNT_DETACH) })
	return nil
}

// add makes an entry for a container that is about to be created.
func (b *sandbox) add(id string) (*container, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closing:
		return nil, precondition("the sandbox is being destroyed")
	case b.pinned == nil:
		return nil, precondition("there is no sandbox yet")
	case b.containers[id] != nil:
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrAlreadyExists)
	}
	c := newContainer(b, id)
	b.containers[id] = c
	return c, nil
}

func (b *sandbox) container(id string) (*container, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.containers[id]; c != nil {
		return c, nil
	}
	return nil, notFound("container %q", bound(id, maxID))
}

func (b *sandbox) forget(c *container) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.containers[c.id] == c {
		delete(b.containers, c.id)
	}
}

func (b *sandbox) all() []*container {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := make([]*container, 0, len(b.containers))
	for _, c := range b.containers {
		list = append(list, c)
	}
	return list
}

// namespaces are those of a container: the sandbox's, its own mount and control
// group namespaces, the pid namespace with the given path or one of its own, and
// user and time namespaces if it wants them.
func (b *sandbox) namespaces(want []specs.LinuxNamespace, mnt *namespace, pid string) []specs.LinuxNamespace {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := []specs.LinuxNamespace{
		{Type: specs.MountNamespace, Path: mnt.path()},
		{Type: specs.NetworkNamespace, Path: b.net.path()},
		{Type: specs.IPCNamespace, Path: b.pinned.ipc.path()},
		{Type: specs.UTSNamespace, Path: b.pinned.uts.path()},
		{Type: specs.CgroupNamespace},
		{Type: specs.PIDNamespace, Path: pid},
	}
	if slices.ContainsFunc(want, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace }) {
		list = append(list, specs.LinuxNamespace{Type: specs.UserNamespace})
	}
	return list
}

// pinnedFiles are the namespaces that an exec joins: the container's, and the
// sandbox' own that its first process began in, wherever it is now.
func (b *sandbox) pinnedFiles(mounts *namespace) ([]*os.File, error) {
	inside, err := b.network.pinned()
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return []*os.File{inside.file, b.pinned.ipc.file, b.pinned.uts.file, mounts.file}, nil
}

func pathOf(list []specs.LinuxNamespace, kind specs.LinuxNamespaceType) string {
	for _, n := range list {
		if n.Type == kind {
			return n.Path
		}
	}
	return ""
}

// guestHooks are those that every container gets.
func (b *sandbox) guestHooks() configs.Hooks {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.hooks
}

// DestroySandbox implements the protocol. Serve returns after it.
func (s *service) DestroySandbox(ctx context.Context, _ *protocol.DestroySandboxRequest) (*emptypb.Empty, error) {
	if err := s.sandbox.setup.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.sandbox.setup.release()
	s.sandbox.destroy(ctx)
	return &emptypb.Empty{}, nil
}

// destroy ends everything, as far as that is possible in time. The caller holds
// setup.
func (b *sandbox) destroy(ctx context.Context) {
	select {
	case <-b.destroyed:
		return
	default:
	}
	b.mu.Lock()
	b.closing = true
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
	defer cancel()
	var removals sync.WaitGroup
	for _, c := range b.all() {
		removals.Go(func() {
			if err := c.remove(ctx); err != nil && !errdefs.IsNotFound(err) {
				log.G(ctx).WithError(err).WithField("container_id", c.id).Warn("container not removed")
			}
		})
	}
	removals.Wait()
	if err := b.pids.acquire(ctx); err == nil {
		_ = b.pidOwner.close()
		b.pidOwner = nil
		b.pids.release()
	}
	if err := errors.Join(b.undo.Run(), b.network.close()); err != nil {
		log.G(ctx).WithError(err).Warn("sandbox not cleaned up")
	}
	close(b.destroyed)
}
