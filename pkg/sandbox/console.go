package sandbox

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

const (
	consoleName    = "con"
	consoleTimeout = 5 * time.Second
	maxConsole     = 1 << 20
)

// ReadConsole asks the owner of the sandbox in dir for the last lines that the
// guest wrote to its console. They are safe to print.
func ReadConsole(ctx context.Context, dir string) (string, error) {
	conn, err := (&net.Dialer{Timeout: consoleTimeout}).DialContext(ctx, "unix", filepath.Join(dir, consoleName))
	if err != nil {
		return "", fmt.Errorf("read console: %w", err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(consoleTimeout))
	quoted, err := io.ReadAll(io.LimitReader(conn, maxConsole))
	if err != nil {
		return "", fmt.Errorf("read console: %w", err)
	}
	lines, err := strconv.Unquote(string(quoted))
	if err != nil {
		return "", fmt.Errorf("read console: %q: %w", quoted, err)
	}
	return lines, nil
}

// serveConsole answers whoever connects to the socket in the sandbox's
// directory with the end of the console. The goroutine ends with the listener.
func (s *Sandbox) serveConsole(ctx context.Context, _ *specs.Spec, _ *hypervisor.Spec, undo *cleanup.Stack) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", filepath.Join(s.opts.Dir, consoleName))
	if err != nil {
		return fmt.Errorf("serve console: %w", err)
	}
	undo.Add(l.Close)
	s.jobs.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(consoleTimeout)) // one that does not read must not keep the next from it
			_, _ = io.WriteString(conn, s.machine.Console())
			_ = conn.Close()
		}
	})
	return nil
}
