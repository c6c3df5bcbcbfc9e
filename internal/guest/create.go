package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// CreateContainer implements the protocol: the container's first process waits
// to be started.
func (s *service) CreateContainer(ctx context.Context, req *protocol.CreateContainerRequest) (*emptypb.Empty, error) {
	if err := checkID("container id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if id := req.GetExecId(); id != "" {
		if err := checkID("exec id", id); err != nil {
			return nil, err
		}
	}
	if err := checkSharedMounts(req.GetSharedMounts()); err != nil {
		return nil, err
	}
	c, err := s.sandbox.add(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	err = c.do(ctx, func() error { return c.create(ctx, req) }, func() { c.abandon(ctx) })
	return &emptypb.Empty{}, err
}

// abandon removes a container whose creator has given up.
func (c *container) abandon(ctx context.Context) {
	_ = c.kill()
	c.reapers.Wait()
	c.closeStreams(ctx)
	_ = c.undo.Run()
	c.discard()
}

// create makes the container, or nothing. It holds the op lock.
func (c *container) create(ctx context.Context, req *protocol.CreateContainerRequest) (err error) {
	defer func() {
		if err != nil {
			_ = c.kill()
			c.reapers.Wait()
			err = errors.Join(err, c.undo.Run())
			c.discard()
		}
	}()
	spec, err := c.prepare(ctx, req)
	if err != nil {
		return err
	}
	rootfs, err := c.makeRootfs(spec.Root.Path)
	if err != nil {
		return err
	}
	c.mounts = rootfs
	c.undo.Add(rootfs.close)
	spec.Root.Path = c.mountPoint()
	pid, err := c.sandbox.pidNamespace(ctx, req.GetSandboxPidns(), req.GetPidNamespaceOf())
	if err != nil {
		return err
	}
	spec.Linux.Namespaces = c.sandbox.namespaces(spec.Linux.Namespaces, rootfs, pid)
	c.ownPID = pathOf(spec.Linux.Namespaces, specs.PIDNamespace) == ""
	if c.lib, err = c.makeContainer(spec); err != nil {
		return err
	}
	execID := req.GetExecId()
	if execID == "" {
		execID = c.id
	}
	p, err := c.launch(spec.Process, execID, true, req.GetNoStdin())
	if err != nil {
		return err
	}
	if c.isDoomed() {
		return precondition("container %q was killed while it was being created", c.id)
	}
	if err := c.addSharedMounts(req.GetSharedMounts(), p); err != nil {
		return err
	}
	unwatch, err := c.sandbox.watcher.add(c.group.file("memory.events"), func() { c.oom.check() })
	if err != nil {
		return err
	}
	c.undo.Add(func() error { unwatch(); c.sandbox.oom.drop(c.id); return nil })
	// It may have died already; that is for StartContainer to say.
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == creating {
		c.state = created
	}
	return nil
}

// prepare mounts the storages and returns the specification, checked.
func (c *container) prepare(ctx context.Context, req *protocol.CreateContainerRequest) (*specs.Spec, error) {
	if req.GetOCI().GetRoot().GetPath() == "" {
		return nil, invalid("container %q has no root file system", c.id)
	}
	c.about = newAbout(req.GetOCI())
	spec := toSpec(req.GetOCI())
	if err := checkProcess(spec.Process); err != nil {
		return nil, err
	}
	c.renewRoot(spec.Root.Path)
	if err := checkPath("root file system", spec.Root.Path); err != nil {
		return nil, err
	}
	if err := c.sandbox.addDevices(ctx, spec, req.GetDevices(), &c.undo); err != nil {
		return nil, err
	}
	for _, storage := range req.GetStorages() {
		release, err := c.sandbox.storages.add(ctx, storage, c.id)
		if err != nil {
			return nil, err
		}
		c.undo.Add(release)
	}
	if u := req.GetStringUser(); u != nil {
		if err := resolveUser(&spec.Process.User, u, spec.Root.Path); err != nil {
			return nil, err
		}
	}
	if cpu := spec.Linux.Resources.CPU; cpu != nil {
		c.wanted = cpuset{cpu.Cpus, cpu.Mems}
		cpu.Cpus, cpu.Mems = c.wanted.clamp()
	}
	return spec, nil
}

func (c *container) mountPoint() string {
	return filepath.Join(c.sandbox.cfg.bundleDir(c.id), "rootfs")
}

// makeRootfs makes the bundle and a mount namespace in which the root file
// system is at its mount point.
func (c *container) makeRootfs(source string) (*namespace, error) {
	dir := c.mountPoint()
	// Never with what is in it: that would be the container's.
	c.undo.Add(func() error { return errors.Join(os.Remove(dir), os.Remove(filepath.Dir(dir))) })
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	return mountNamespace(func() error {
		if err := unix.Mount(source, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return &os.PathError{Op: "bind root file system", Path: source, Err: err}
		}
		return nil
	})
}

// renewRoot forgets what was below the share at the container's path: one of the same
// name may have been there a moment ago.
func (c *container) renewRoot(path string) {
	at := c.sandbox.cfg.shareDir()
	rel, below := strings.CutPrefix(filepath.Clean(path), at+"/")
	if !below {
		return
	}
	for name := range strings.SplitSeq(rel, "/") {
		at = filepath.Join(at, name)
		askHost(at)
	}
}

// makeContainer describes the container to libcontainer. Nothing runs yet.
func (c *container) makeContainer(spec *specs.Spec) (*libcontainer.Container, error) {
	spec.Linux.CgroupsPath = filepath.Join(cgroupParent, c.id)
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: c.id, Spec: spec})
	if err != nil {
		return nil, invalid("container %q: %s", c.id, err)
	}
	c.hooks = splitHooks(config.Hooks, c.sandbox.guestHooks())
	lib, err := libcontainer.Create(c.sandbox.cfg.stateDir(), c.id, config)
	if err != nil {
		return nil, fmt.Errorf("create container %q: %w", c.id, err)
	}
	c.undo.Add(lib.Destroy)
	return lib, nil
}

// launch starts a process by libcontainer: for the first one that is up to where
// it waits. It holds the op lock.
func (c *container) launch(spec *specs.Process, execID string, init, noStdin bool) (_ *process, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	lib, err := newProcess(spec)
	if err != nil {
		return nil, err
	}
	lib.Init = init
	config := c.lib.Config()
	o := stdioOptions{terminal: spec.Terminal, noStdin: noStdin, pipeSize: c.sandbox.cfg.PipeSize}
	o.uid, o.gid = rootOf(&config)
	streams, err := newStdio(lib, o)
	if err != nil {
		return nil, err
	}
	undo.Add(func() error { streams.close(); return nil })
	if !init && !config.Namespaces.Contains(configs.NEWUSER) {
		// In a user namespace it may not; nor could the first process move the others.
		if lib.ExtraFiles, err = c.sandbox.pinnedFiles(c.mounts); err != nil {
			return nil, err
		}
	}
	// The first steps are Go, too, until they execute the command. That gets the
	// kernel's own slack again (cmd/vmshim-agent/monitor.go), but for the thread that
	// asks for its default by PR_SET_TIMERSLACK: that is the parent's.
	start := func() error { return c.lib.Start(lib) }
	if err := thread.WithTimerSlack(thread.CalmMonitor, start); err != nil {
		c.reapStrays()
		if c.isDoomed() {
			return nil, precondition("container %q was killed", c.id)
		}
		return nil, fmt.Errorf("start process %q of container %q: %w%s", execID, c.id, err, streams.lastWords())
	}
	p := &process{id: execID, init: init, lib: lib, io: streams, done: make(chan struct{})}
	noConsole := streams.started(o)
	if err := c.adopt(p); err != nil {
		_ = lib.Signal(unix.SIGKILL)
		_, _ = lib.Wait()
		return nil, err
	}
	if noConsole != nil {
		c.dismiss(p)
		return nil, noConsole
	}
	undo.Release()
	return p, nil
}

// dismiss ends a process that nobody knows of.
func (c *container) dismiss(p *process) {
	_ = p.signal(unix.SIGKILL)
	<-p.done
	c.waited(p)
}

// rootOf is root's id in the user namespace of the container.
func rootOf(config *configs.Config) (uid, gid int) {
	uid, _ = config.HostRootUID()
	gid, _ = config.HostRootGID()
	return max(uid, 0), max(gid, 0)
}

// StartContainer implements the protocol.
func (s *service) StartContainer(ctx context.Context, req *protocol.StartContainerRequest) (*emptypb.Empty, error) {
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, c.do(ctx, c.start, nil)
}

// start lets the first process go on. It waits in the open of a fifo, which
// libcontainer would open with a goroutine that stays when the process dies.
func (c *container) start() error {
	if st := c.current(); st != created {
		return precondition("container %q is %s", c.id, st)
	}
	if err := c.runHooks(configs.StartContainer); err != nil {
		return err
	}
	path := filepath.Join(c.sandbox.cfg.stateDir(), c.id, "exec.fifo")
	// For writing too: then it never blocks, and there is no end of file before
	// the process has opened it.
	fifo, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("start container %q: %w", c.id, err)
	}
	defer fifo.Close()
	stop := make(chan struct{})
	c.jobs.Go(func() {
		select {
		case <-c.init.done:
			_ = fifo.SetReadDeadline(time.Unix(1, 0))
		case <-stop:
		}
	})
	defer close(stop)
	if _, err := fifo.Read(make([]byte, 1)); err != nil {
		return precondition("start container %q: its process has ended", c.id)
	}
	_ = os.Remove(path) // by which libcontainer knows that it runs
	c.begun()
	if err := c.runHooks(configs.Poststart); err != nil {
		return errors.Join(err, c.kill())
	}
	return nil
}

// begun notes that the first process runs, unless it has ended already.
func (c *container) begun() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == created {
		c.state = running
	}
}

// ExecProcess implements the protocol.
func (s *service) ExecProcess(ctx context.Context, req *protocol.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := checkID("exec id", req.GetExecId()); err != nil {
		return nil, err
	}
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	spec := toProcess(req.GetProcess())
	if err := checkProcess(spec); err != nil {
		return nil, err
	}
	var p *process
	err = c.do(ctx, func() (err error) {
		p, err = c.exec(spec, req)
		return err
	}, func() { c.dismiss(p) })
	return &emptypb.Empty{}, err
}

// exec starts a process in the container. It holds the op lock.
func (c *container) exec(spec *specs.Process, req *protocol.ExecProcessRequest) (*process, error) {
	if err := c.reserve(req.GetExecId()); err != nil {
		return nil, err
	}
	// A process born in a frozen group does not reach its exec, for which the
	// whole agent would wait.
	if c.group.frozen() {
		return nil, precondition("container %q is frozen", c.id)
	}
	if u := req.GetStringUser(); u != nil {
		root := fmt.Sprintf("/proc/%d/root", c.init.pid)
		if err := resolveUser(&spec.User, u, root); err != nil {
			return nil, err
		}
	}
	p, err := c.launch(spec, req.GetExecId(), false, req.GetNoStdin())
	if err != nil {
		return nil, err
	}
	if c.isDoomed() {
		_ = p.signal(unix.SIGKILL)
	}
	return p, nil
}
