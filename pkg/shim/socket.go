package shim

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	unixScheme = "unix://"
	// dialTimeout bounds a connect to a socket of this machine: it only takes
	// time when the other side has stopped accepting.
	dialTimeout = time.Second
)

// socketAddress is where the shim of a sandbox listens. The name is a hash,
// as in containerd's own shims: ids of any length fit, and none is guessed.
func socketAddress(dir, daemon, namespace, sandbox string) string {
	sum := sha256.Sum256([]byte(filepath.Join(daemon, namespace, sandbox)))
	return fmt.Sprintf("%s%s/%x", unixScheme, dir, sum)
}

func socketPath(address string) string { return strings.TrimPrefix(address, unixScheme) }

// dial connects to a unix socket, given as a path or with the scheme.
func dial(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var d net.Dialer
	return d.DialContext(ctx, "unix", socketPath(address))
}

// listen binds the socket, in place of one whose owner is gone.
func listen(ctx context.Context, address string) (*net.UnixListener, error) {
	path := socketPath(address)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make socket directory: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if errors.Is(err, unix.EADDRINUSE) {
		if conn, err := dial(ctx, address); err == nil {
			_ = conn.Close()
			return nil, fmt.Errorf("a shim serves %s already: %w", address, errdefs.ErrAlreadyExists)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove stale socket: %w", err)
		}
		l, err = lc.Listen(ctx, "unix", path)
	}
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	ul := l.(*net.UnixListener)
	ul.SetUnlinkOnClose(false) // the daemon goes on with it
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ul.Close()
		_ = os.Remove(path)
		return nil, fmt.Errorf("protect socket: %w", err)
	}
	return ul, nil
}
