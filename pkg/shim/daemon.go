package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	// flushTimeout bounds how long a daemon that ends waits for containerd to
	// take the last events, and byeTimeout for its clients to hang up.
	flushTimeout = 5 * time.Second
	byeTimeout   = 500 * time.Millisecond
	// stopTimeout bounds the stop of the sandbox when the daemon ends by a signal.
	stopTimeout = 30 * time.Second
)

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
	if c.options, err = inheritOptions(); err != nil {
		return err
	}
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
	told, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
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
	svc.registerSandbox(server)
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()

	// Nobody waits for this daemon when start is gone.
	if _, err = fmt.Fprint(ready, readyWord); err == nil {
		err = ready.Close()
	}
	if err == nil {
		select {
		case <-svc.done:
		case <-told.Done():
			log.G(ctx).Warn("stopped by a signal")
		case err = <-served:
			served <- nil
		}
	}
	// The path goes before the listener: another shim for the same sandbox may
	// come as soon as nobody answers here, and then the path is its own.
	_ = os.Remove(l.Addr().String())
	last, cancel := context.WithTimeout(ctx, stopTimeout)
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

func inheritOptions() (*anypb.Any, error) {
	f := os.NewFile(optionsFD, "options")
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxInput))
	if err != nil {
		return nil, fmt.Errorf("read options (this program is started by containerd): %w", err)
	}
	var options anypb.Any
	if err := proto.Unmarshal(text, &options); err != nil {
		return nil, fmt.Errorf("decode options: %w", err)
	}
	return &options, nil
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

// trimMemory trades a little time for memory: a node has one shim for each
// pod, and most of them are idle.
func trimMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
}
