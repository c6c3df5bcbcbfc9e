package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

const (
	// exitKilled is how a task ended whose end nobody saw.
	exitKilled = 128 + 9
	// deleteTimeout is below the five seconds that containerd gives to delete.
	deleteTimeout = 4500 * time.Millisecond
	// answerTimeout is more than the daemon ever takes to answer State.
	answerTimeout = time.Second
	// leaveTimeout bounds the wait for a daemon that is about to end.
	leaveTimeout = 2 * time.Second
)

// delete cleans up after a task. containerd runs it when the connection to the
// daemon ends, and that has many reasons:
//
//   - the task was deleted and the daemon shut down: wait until it is gone;
//   - the task was deleted, its pod lives on: there is nothing to do;
//   - the daemon died: everything of its sandbox is killed and removed;
//   - the daemon hangs, or containerd gave a task up: as before, after killing
//     the daemon. But a container that is only a member of a pod takes nobody
//     with it; it goes with its pod.
func (c command) delete(ctx context.Context, stdout io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	r, err := c.record()
	if err != nil {
		return err
	}
	if c.release(ctx, r) {
		err = sandbox.Reap(ctx, r.Dir)
		if r.Address != "" {
			err = errors.Join(err, removeIfThere(socketPath(r.Address)))
		}
	}
	// Only old daemons leave it to the shim; MNT_DETACH does not wait for users.
	_ = unix.Unmount(filepath.Join(c.bundle, "rootfs"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("delete %q: %w", c.id, err)
	}
	return answerDelete(stdout, uint32(r.Task))
}

// record reads the bundle's record, or derives it when the daemon died before
// it could write one.
func (c command) record() (record, error) {
	r, err := readRecord(c.bundle)
	if err != nil {
		if r.Sandbox, err = bundleSandbox(c.bundle, c.id); err != nil {
			r.Sandbox = c.id // a damaged specification: nothing was started from it
		}
		r.Address = readAddress(c.bundle)
	}
	if r.Dir == "" {
		cfg, err := config.Load("")
		if err != nil {
			return r, err
		}
		r.Dir = sandbox.Dir(cfg.StateDir, c.address, c.namespace, r.Sandbox)
	}
	return r, nil
}

// release says whether the sandbox of the task may be removed: its daemon is
// gone, or was made to go.
func (c command) release(ctx context.Context, r record) bool {
	if r.PID == 0 {
		// No daemon has seen this task. It is its own to clean up after, but a
		// member of a pod left nothing.
		return r.Sandbox == c.id
	}
	daemon, err := openPidfd(r.PID, r.StartTime)
	if err != nil {
		return true
	}
	defer daemon.close()
	if daemon.wait(0) {
		return true
	}
	known, err := c.ask(ctx, r)
	switch {
	case r.Sandbox != c.id:
		if known {
			c.drop(ctx, r.Address)
		}
		return false
	case known, errors.Is(err, context.DeadlineExceeded):
		// Given up by containerd, or hanging.
	case err == nil:
		// It was told to shut down, and goes unless it has other containers.
		return daemon.wait(leaveTimeout)
	default: // it does not accept connections any more, or cut this one
		if daemon.wait(leaveTimeout) {
			return true
		}
	}
	daemon.kill()
	daemon.wait(answerTimeout)
	return true
}

// ask asks the daemon for the task's state, and to shut down when it does not
// know the task that stands for its sandbox.
func (c command) ask(ctx context.Context, r record) (known bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	err = withDaemon(ctx, r.Address, func(tasks taskapi.TTRPCTaskService) error {
		_, err := tasks.State(ctx, &taskapi.StateRequest{ID: c.id})
		if err = errgrpc.ToNative(err); err == nil {
			known = true
		}
		if errdefs.IsNotFound(err) && r.Sandbox == c.id {
			_, err = tasks.Shutdown(ctx, &taskapi.ShutdownRequest{ID: c.id})
		}
		return err
	})
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return known, err
}

// drop removes a container from a pod that lives on.
func (c command) drop(ctx context.Context, address string) {
	_ = withDaemon(ctx, address, func(tasks taskapi.TTRPCTaskService) error {
		// Each may fail because the container is further than that already.
		_, _ = tasks.Kill(ctx, &taskapi.KillRequest{ID: c.id, Signal: uint32(unix.SIGKILL), All: true})
		_, _ = tasks.Wait(ctx, &taskapi.WaitRequest{ID: c.id})
		_, err := tasks.Delete(ctx, &taskapi.DeleteRequest{ID: c.id})
		return err
	})
}

func withDaemon(ctx context.Context, address string, f func(taskapi.TTRPCTaskService) error) error {
	conn, err := dial(ctx, address)
	if err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline) // the client itself ignores ctx while it writes
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	return f(taskapi.NewTTRPCTaskClient(client))
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
