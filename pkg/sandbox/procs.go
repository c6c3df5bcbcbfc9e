package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// EnvMark is the variable that every process of a sandbox has in its
// environment; its value is the sandbox's directory.
const EnvMark = "VMSHIM_SANDBOX"

// mark is the environment of the processes of the sandbox in dir.
func mark(dir string) string { return EnvMark + "=" + dir }

// stat reads the state and the start time (fields 3 and 22 of proc_pid_stat(5)).
func stat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The second field is the command in parentheses; it may contain anything.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return fields[0][0], start, err
}

// processOf names a process for good.
func processOf(role string, pid int) (hypervisor.Process, error) {
	_, start, err := stat(pid)
	return hypervisor.Process{Role: role, PID: pid, StartTime: start}, err
}

// alive says whether p runs, and is not another process with its pid.
func alive(p hypervisor.Process) bool {
	state, start, err := stat(p.PID)
	return err == nil && start == p.StartTime && state != 'Z' && state != 'X'
}

// marked lists the processes that carry the mark of the sandbox in dir.
func marked(dir string) ([]hypervisor.Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []hypervisor.Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !carries(pid, mark(dir)) {
			continue
		}
		if p, err := processOf("marked", pid); err == nil {
			found = append(found, p)
		}
	}
	return found, nil
}

func carries(pid int, variable string) bool {
	env, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return false // gone, or a kernel thread
	}
	for v := range bytes.SplitSeq(env, []byte{0}) {
		if string(v) == variable {
			return true
		}
	}
	return false
}

// killAll kills processes and waits until they have ended; the caller's own
// process is spared.
func killAll(ctx context.Context, procs []hypervisor.Process) error {
	var fds []unix.PollFd
	defer func() {
		for _, p := range fds {
			_ = unix.Close(int(p.Fd))
		}
	}()
	var errs []error
	for _, p := range procs {
		if p.PID <= 1 || p.PID == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(p.PID, 0)
		if err != nil {
			continue // gone
		}
		// Looked at after the fd was opened: it can't be another one now.
		if !alive(p) {
			_ = unix.Close(fd)
			continue
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("kill %s %d: %w", p.Role, p.PID, err))
		}
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for i := range fds {
		if err := awaitExit(ctx, fds[i:i+1]); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// awaitExit waits for one pidfd until the deadline of ctx.
func awaitExit(ctx context.Context, fd []unix.PollFd) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(reapTimeout)
	}
	for {
		left := max(0, time.Until(deadline))
		n, err := unix.Poll(fd, int(left.Milliseconds())+1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("poll", err)
		case n == 0:
			return fmt.Errorf("a killed process does not end: %w", context.DeadlineExceeded)
		}
		return nil
	}
}
