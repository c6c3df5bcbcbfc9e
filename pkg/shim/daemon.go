package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// How the daemon is born. start makes the listening socket, so that nothing
// can be lost between the answer and the first connection, and runs the binary
// again without an action: in a session of its own, in the bundle's directory,
// with these descriptors and variables.
const (
	socketFD = 3 // the listening socket
	readyFD  = 4 // where the daemon says that it serves, or why not

	readyWord = "ok"

	// hostNamespaceEnv is the mount namespace of start. The daemon that finds
	// itself in another one cuts it from the host's; without it, or in the same
	// one, it leaves all mounts alone.
	hostNamespaceEnv = "VMSHIM_HOST_MNTNS"

	// beganEnv is when start began, in nanoseconds since the epoch.
	beganEnv = "VMSHIM_BEGAN"

	logFile = "log"

	// flushTimeout bounds how long a daemon that ends waits for containerd to
	// take the last events, and byeTimeout for its clients to hang up.
	flushTimeout = 5 * time.Second
	byeTimeout   = 500 * time.Millisecond
	// stopTimeout bounds the stop of the sandbox when the daemon ends by a signal.
	stopTimeout = 30 * time.Second
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
	self, err := os.Executable()
	if err != nil {
		return err
	}
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
	logger, err := openLog(c.bundle)
	if err != nil {
		return err
	}
	defer logger.Close()

	// Not bound to ctx: the daemon outlives this process.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, c.daemonArgs()...)
	cmd.Dir = c.bundle
	cmd.Env = append(os.Environ(),
		"TTRPC_ADDRESS="+c.ttrpc,
		beganEnv+"="+strconv.FormatInt(c.began.UnixNano(), 10))
	cmd.Stderr = logger
	cmd.ExtraFiles = []*os.File{socketFD - 3: sock, readyFD - 3: readyW}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if hostSharesMounts() {
		ns, err := os.Readlink("/proc/self/ns/mnt")
		if err != nil {
			return err
		}
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNS
		cmd.Env = append(cmd.Env, hostNamespaceEnv+"="+ns)
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	shieldFromOOM(cmd.Process.Pid)
	_ = readyW.Close()
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

// leaveHostMounts keeps what the daemon mounts out of the host's namespace.
func leaveHostMounts() error {
	host := os.Getenv(hostNamespaceEnv)
	_ = os.Unsetenv(hostNamespaceEnv)
	if host == "" {
		return nil
	}
	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil || ns == host {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts a slave of the host's: %w", err)
	}
	return nil
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

// serve is the daemon.
func serve(ctx context.Context, c command, opts Options) (err error) {
	ready := os.NewFile(readyFD, "ready")
	defer func() {
		if err != nil {
			_, _ = fmt.Fprint(ready, err)
		}
		_ = ready.Close()
	}()
	unix.CloseOnExec(readyFD)
	l, err := inheritSocket()
	if err != nil {
		return err
	}
	defer l.Close()
	if err := leaveHostMounts(); err != nil {
		return err
	}
	if ns, err := strconv.ParseInt(os.Getenv(beganEnv), 10, 64); err == nil {
		c.began = time.Unix(0, ns)
	}
	self := record{
		Sandbox: c.id,
		Address: unixScheme + l.Addr().String(),
		PID:     os.Getpid(),
	}
	if self.StartTime, err = processStart(self.PID); err != nil {
		return err
	}
	if err := self.write(c.bundle); err != nil {
		return err
	}
	trimMemory()
	ctx = withLogger(ctx, c)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()

	events := newPublisher(ctx, c.ttrpc, c.namespace)
	svc := newService(ctx, c, opts, self, events)
	visitors := newDoor()
	server, err := ttrpc.NewServer(
		ttrpc.WithServerHandshaker(visitors),
		ttrpc.WithUnaryServerInterceptor(edge),
	)
	if err != nil {
		return err
	}
	svc.register(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()

	// Nobody waits for this daemon when start is gone.
	if _, err = fmt.Fprint(ready, readyWord); err == nil {
		err = ready.Close()
	}
	if err == nil {
		select {
		case <-svc.done:
		case <-ctx.Done():
			log.G(ctx).Warn("stopped by a signal")
		case err = <-served:
			served <- nil
		}
	}
	// The path goes before the listener: another shim for the same sandbox may
	// come as soon as nobody answers here, and then the path is its own.
	_ = os.Remove(l.Addr().String())
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	svc.close(last)
	flush, cancel := context.WithTimeout(last, flushTimeout)
	defer cancel()
	events.close(flush)
	bye, cancel := context.WithTimeout(last, byeTimeout)
	defer cancel()
	visitors.wait(bye)
	_ = server.Close()
	return errors.Join(err, ignoreClosed(<-served))
}

// ignoreClosed drops the error of a server that was closed.
func ignoreClosed(err error) error {
	if errors.Is(err, ttrpc.ErrServerClosed) {
		return nil
	}
	return err
}

func inheritSocket() (*net.UnixListener, error) {
	f := os.NewFile(socketFD, "socket")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take over socket (this program is started by containerd): %w", err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("take over socket: %s is no unix socket", l.Addr())
	}
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// trimMemory trades a little time for memory: a node has one shim per pod, and
// most of them are idle.
func trimMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
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
