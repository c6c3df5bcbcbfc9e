package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// Two ways to signal a process: the protocol's, with its rules, and ours, which
// does what runc does. Neither waits for anything.

// SignalProcess implements the protocol: SIGTERM to a first process that would
// not notice kills it, SIGKILL without a process kills all, and a process that
// has ended is no error as long as nobody waited for it.
func (s *service) SignalProcess(_ context.Context, req *protocol.SignalProcessRequest) (*emptypb.Empty, error) {
	sig, err := checkSignal(req.GetSignal())
	if err != nil {
		return nil, err
	}
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	if req.GetExecId() == "" && sig == unix.SIGKILL {
		if err := c.kill(); err != nil {
			return nil, fmt.Errorf("kill container %q: %w", c.id, err)
		}
		return &emptypb.Empty{}, nil
	}
	p, err := c.signallable(req.GetExecId(), sig)
	if p == nil {
		return &emptypb.Empty{}, err
	}
	if p.init && sig == unix.SIGTERM && ignorant(p.pid, sig) {
		sig = unix.SIGKILL
	}
	if err := p.signal(sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("signal process %q: %w", p.id, err)
	}
	return &emptypb.Empty{}, nil
}

// Signal implements the extension, by runc's rules.
func (s *service) Signal(_ context.Context, req *extension.SignalRequest) (*emptypb.Empty, error) {
	sig, err := checkSignal(req.GetSignal())
	if err != nil {
		return nil, err
	}
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	if req.GetAll() {
		return &emptypb.Empty{}, c.signalAll(sig)
	}
	p, err := c.signallable(req.GetExecId(), sig)
	if p == nil {
		return &emptypb.Empty{}, err
	}
	if p.init && sig == unix.SIGKILL && !c.ownPID && !p.ended() {
		// Its death would not end the others.
		return &emptypb.Empty{}, c.signalAll(sig)
	}
	if err := p.signal(sig); err != nil {
		return nil, fmt.Errorf("signal process: %w", notRunning(p, err))
	}
	return &emptypb.Empty{}, nil
}

// signallable finds the process. A container that is still being created has
// none, but it can be killed: then there is neither a process nor an error.
func (c *container) signallable(execID string, sig unix.Signal) (*process, error) {
	if c.current() == creating && sig == unix.SIGKILL && (execID == "" || execID == c.id) {
		return nil, c.kill()
	}
	return c.live(execID)
}

// signalAll signals every process of the container.
func (c *container) signalAll(sig unix.Signal) error {
	if sig == unix.SIGKILL {
		if err := c.kill(); err != nil {
			return fmt.Errorf("kill container %q: %w", c.id, err)
		}
		return nil
	}
	pids, err := c.group.pids()
	if err != nil {
		return fmt.Errorf("list processes of container %q: %w", c.id, err)
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d of container %q: %w", pid, c.id, err)
		}
	}
	return nil
}

func checkSignal(n uint32) (unix.Signal, error) {
	if n > maxSignal {
		return 0, invalid("signal %d", n)
	}
	return unix.Signal(n), nil
}

// ignorant says whether the process would not notice the signal: the first
// process of a pid namespace gets none that it has no handler for.
func ignorant(pid int, sig unix.Signal) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	return err == nil && !noticesSignal(string(b), sig)
}

// noticesSignal reads a /proc/PID/status: is the signal caught, blocked or ignored?
func noticesSignal(status string, sig unix.Signal) bool {
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		switch key {
		case "SigBlk", "SigIgn", "SigCgt":
			mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			if err == nil && mask&(1<<(sig-1)) != 0 {
				return true
			}
		}
	}
	return false
}
