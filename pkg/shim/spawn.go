package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// How the daemon is born. start makes the listening socket, so that nothing
// can be lost between the answer and the first connection, and runs the binary
// again without an action: in a session of its own, in the bundle's directory,
// with these descriptors and variables.
const (
	socketFD = 3 // the listening socket
	readyFD  = 4 // where the daemon says that it serves, or why not
	// optionsFD has the runtime's options: with the sandbox API they come with
	// start, and never again.
	optionsFD = 5

	readyWord = "ok"

	// hostNamespaceEnv is the mount namespace of start. The daemon that finds
	// itself in another one cuts it from the host's; without it, or in the same
	// one, it leaves all mounts alone.
	hostNamespaceEnv = "VMSHIM_HOST_MNTNS"

	// beganEnv is when start began, in nanoseconds since the epoch.
	beganEnv = "VMSHIM_BEGAN"

	logFile = "log"

	// maxProcs bounds the daemon's threads, as containerd does for start.
	maxProcs = "2"
	// smallPages keeps the daemon's heap of few megabytes out of huge pages, which a
	// host with transparent_hugepage=always has it fill.
	smallPages = "disablethp=1"
)

// launch returns the address of the daemon for the task in the bundle. A
// container that joins a pod gets that of the pod's, which must run.
func (c command) launch(ctx context.Context, socketDir string) (string, error) {
	group, err := bundleSandbox(c.bundle, c.id)
	if err != nil {
		return "", err
	}
	address := socketAddress(socketDir, c.address, c.namespace, group)
	if group != c.id {
		conn, err := dial(ctx, address)
		if err != nil {
			return "", fmt.Errorf("connect to the shim of sandbox %q: %w: %w", group, errdefs.ErrUnavailable, err)
		}
		return address, conn.Close()
	}
	l, err := listen(ctx, address)
	if err != nil {
		return "", err
	}
	defer l.Close()
	if err := c.spawn(ctx, l); err != nil {
		_ = os.Remove(socketPath(address))
		return "", fmt.Errorf("start daemon: %w", err)
	}
	return address, nil
}

// spawn starts the daemon and returns when it serves.
func (c command) spawn(ctx context.Context, l *net.UnixListener) error {
	sock, err := l.File()
	if err != nil {
		return err
	}
	defer sock.Close()
	ready, readyW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer readyW.Close()
	options, optionsW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer options.Close()
	defer optionsW.Close()
	logger, err := openLog(c.bundle)
	if err != nil {
		return err
	}
	defer logger.Close()
	cmd, err := c.daemon(ctx)
	if err != nil {
		return err
	}
	cmd.Stderr = logger
	cmd.ExtraFiles = []*os.File{socketFD - 3: sock, readyFD - 3: readyW, optionsFD - 3: options}
	if err := cmd.Start(); err != nil {
		return err
	}
	shieldFromOOM(cmd.Process.Pid)
	_ = readyW.Close() // the daemon's is the only one now
	_ = options.Close()
	if err := writeOptions(optionsW, c.options); err != nil {
		_ = cmd.Process.Kill()
		return errors.Join(err, cmd.Wait())
	}
	return awaitReady(cmd, ready)
}

// daemon is the command that becomes the daemon.
func (c command) daemon(ctx context.Context) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// Not bound to ctx: the daemon outlives this process.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, c.daemonArgs()...)
	cmd.Dir = c.bundle
	cmd.Env = append([]string{"GOMAXPROCS=" + maxProcs}, os.Environ()...) // of two, the last one counts
	cmd.Env = append(cmd.Env, "GODEBUG="+strings.TrimPrefix(os.Getenv("GODEBUG")+","+smallPages, ","))
	cmd.Env = append(cmd.Env, "TTRPC_ADDRESS="+c.ttrpc, beganEnv+"="+strconv.FormatInt(c.began.UnixNano(), 10))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if hostSharesMounts() {
		ns, err := os.Readlink("/proc/self/ns/mnt")
		if err != nil {
			return nil, err
		}
		// Not Unshareflags: that would cut the new namespace from the host's.
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNS
		cmd.Env = append(cmd.Env, hostNamespaceEnv+"="+ns)
	}
	return cmd, nil
}

// writeOptions passes on what start was told. The daemon reads it first of all.
func writeOptions(w io.WriteCloser, options *anypb.Any) error {
	text, err := proto.Marshal(options)
	if err == nil {
		_, err = w.Write(text)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("pass options: %w", err)
	}
	return nil
}

// awaitReady returns when the daemon serves, or with what it says instead.
func awaitReady(cmd *exec.Cmd, ready io.Reader) error {
	word, err := io.ReadAll(io.LimitReader(ready, 64<<10))
	if string(word) == readyWord && err == nil {
		return cmd.Process.Release()
	}
	_ = cmd.Process.Kill()
	err = errors.Join(err, cmd.Wait())
	if len(word) > 0 {
		return errors.New(string(word))
	}
	return fmt.Errorf("ended before it served: %w", err)
}

func (c command) daemonArgs() []string {
	args := []string{"-namespace", c.namespace, "-id", c.id, "-address", c.address}
	if c.debug {
		args = append(args, "-debug")
	}
	return args
}

// hostSharesMounts says whether mounts that the host makes later would reach a
// mount namespace of the daemon's own. Where they would not, the daemon stays
// in the host's: it must see what containerd mounts after it was started.
func hostSharesMounts() bool {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter("/"))
	return err == nil && len(mounts) > 0 && strings.Contains(mounts[len(mounts)-1].Optional, "shared:")
}

// shieldFromOOM gives the daemon the score of containerd plus one, as all
// shims have: it goes before containerd, and after the containers.
// Best effort: lowering a score is a privilege.
func shieldFromOOM(pid int) {
	score := func(pid int) string { return "/proc/" + strconv.Itoa(pid) + "/oom_score_adj" }
	text, err := os.ReadFile(score(os.Getppid()))
	if err != nil {
		return
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return
	}
	_ = os.WriteFile(score(pid), []byte(strconv.Itoa(min(n+1, 1000))), 0)
}

// openLog opens what containerd reads the daemon's log from. Both ends are
// opened, so that a daemon of containerd that is gone for a while is no error.
func openLog(bundle string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(bundle, logFile), os.O_RDWR|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return os.OpenFile(os.DevNull, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}
