package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/thread"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

const (
	maxRules      = 4<<20 - 4<<10 // what fits into a message
	maxStderr     = 2 << 10
	programPeriod = 2 * time.Second // to close its output after its end
)

// GetIPTables implements the protocol.
func (s *service) GetIPTables(ctx context.Context, req *protocol.GetIPTablesRequest) (*protocol.GetIPTablesResponse, error) {
	data, err := s.sandbox.network.run(ctx, nil, tool("save", req.GetIsIpv6()))
	if err != nil {
		return nil, err
	}
	return &protocol.GetIPTablesResponse{Data: data}, nil
}

// SetIPTables implements the protocol. Tables that the data does not name stay
// as they are.
func (s *service) SetIPTables(ctx context.Context, req *protocol.SetIPTablesRequest) (*protocol.SetIPTablesResponse, error) {
	// The old implementation has one lock for all; the new one takes the option, too.
	data, err := s.sandbox.network.run(ctx, req.GetData(), tool("restore", req.GetIsIpv6()), "--wait")
	if err != nil {
		return nil, err
	}
	return &protocol.SetIPTablesResponse{Data: data}, nil
}

func tool(verb string, v6 bool) string {
	if v6 {
		return "ip6tables-" + verb
	}
	return "iptables-" + verb
}

// run runs a program of the guest in the sandbox' network and returns what it
// writes. Programs that refuse their input are expected to end with 1 or 2.
func (n *network) run(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	ns, err := n.pin()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, name, args...)
	if errors.Is(cmd.Err, exec.ErrNotFound) {
		return nil, notImplemented(name)
	}
	stdout, stderr := &limited{limit: maxRules}, &limited{limit: maxStderr}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), stdout, stderr
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.WaitDelay = programPeriod
	err = thread.Run(func() error {
		if err := ns.enter(); err != nil {
			return err
		}
		return cmd.Start()
	})
	if err == nil {
		err = cmd.Wait()
	}
	switch exit := (*exec.ExitError)(nil); {
	case err == nil && stdout.cut:
		return nil, fmt.Errorf("%s: more than %d bytes: %w", name, maxRules, errdefs.ErrResourceExhausted)
	case err == nil:
		return stdout.kept, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s: %w", name, ctx.Err())
	case errors.As(err, &exit):
		text := bound(strings.TrimSpace(string(stderr.kept)), maxStderr)
		if len(stdin) > 0 && (exit.ExitCode() == 1 || exit.ExitCode() == 2) {
			return nil, invalid("%s: %s", name, text)
		}
		return nil, fmt.Errorf("%s: %w: %s", name, err, text)
	}
	return nil, fmt.Errorf("%s: %w", name, err)
}

// limited keeps the beginning of what is written to it.
type limited struct {
	kept  []byte
	limit int
	cut   bool
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.limit-len(l.kept))
	l.cut = l.cut || n < len(p)
	l.kept = append(l.kept, p[:n]...)
	return len(p), nil
}
