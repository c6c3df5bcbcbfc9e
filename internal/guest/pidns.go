package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/pause"
)

// nobody is the user that has no files.
const nobody = 65534

// A pidOwner is the first process of the pid namespace that containers of the
// sandbox share: it does nothing but be there. Of the guest it has nothing, no
// files, no network, no user.
type pidOwner struct {
	cmd   *exec.Cmd
	root  string
	ended chan struct{} // closed when it was reaped
}

// startPidOwner starts one, with an empty directory below dir as its root.
func startPidOwner(dir string) (_ *pidOwner, err error) {
	program, err := pause.Program("pause")
	if err != nil {
		return nil, err
	}
	o := &pidOwner{root: filepath.Join(dir, ".pause"), ended: make(chan struct{})}
	if err := os.MkdirAll(o.root, 0o711); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(o.root))
		}
	}()
	path := filepath.Join(o.root, "pause")
	if err := os.WriteFile(path, program, 0o555); err != nil {
		return nil, err
	}
	o.cmd = exec.Command("/pause") //nolint:noctx // it lives as long as the sandbox
	o.cmd.Env, o.cmd.Dir = []string{}, "/"
	o.cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot:     o.root,
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody},
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	if err := o.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // joined by close
		_ = o.cmd.Wait()
		close(o.ended)
	}()
	if err := os.Remove(path); err != nil {
		return nil, errors.Join(err, o.close())
	}
	return o, nil
}

// close ends it and with it whatever is in its namespace.
func (o *pidOwner) close() error {
	if o == nil {
		return nil
	}
	_ = o.cmd.Process.Kill()
	<-o.ended
	return os.Remove(o.root)
}

// sharedPID is the path of the shared pid namespace, made for the first container
// that wants it. Somebody in it may have killed its first process: then the next
// one begins another namespace.
func (b *sandbox) sharedPID(ctx context.Context) (string, error) {
	if err := b.pids.acquire(ctx); err != nil {
		return "", err
	}
	defer b.pids.release()
	if b.pidOwner != nil {
		select {
		case <-b.pidOwner.ended:
			_ = b.pidOwner.close()
			b.pidOwner = nil
		default:
		}
	}
	if b.pidOwner == nil {
		owner, err := startPidOwner(b.cfg.stateDir())
		if err != nil {
			return "", fmt.Errorf("make shared pid namespace: %w", err)
		}
		b.pidOwner = owner
	}
	return fmt.Sprintf("/proc/%d/ns/pid", b.pidOwner.cmd.Process.Pid), nil
}

// pidNamespace is the path of the pid namespace that a container joins: that of
// another container, the shared one, or none for a new one.
func (b *sandbox) pidNamespace(ctx context.Context, shared bool, of string) (string, error) {
	if of == "" {
		if shared {
			return b.sharedPID(ctx)
		}
		return "", nil
	}
	c, err := b.container(of)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.init == nil || c.init.ended() {
		return "", precondition("container %q does not run: its pid namespace is gone", bound(of, maxID))
	}
	return fmt.Sprintf("/proc/%d/ns/pid", c.init.pid), nil
}
