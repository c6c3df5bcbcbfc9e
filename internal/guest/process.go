package guest

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A process is one that the agent started: the first of a container, or an exec.
type process struct {
	id   string // its exec id; the container's own for the first one
	init bool
	pid  int
	lib  *libcontainer.Process
	io   *stdio

	mu    sync.Mutex
	pidfd *os.File // guarded by mu; nil when the process is gone

	done chan struct{} // closed when the fields below are set
	exit exit

	// waited says that a WaitProcess has completed: for the protocol the process
	// is gone then. Guarded by the container's mu.
	waited bool
}

// An exit is how a process ended.
type exit struct {
	status    int32
	at        time.Time
	oomKilled bool
}

// track takes over a process that libcontainer has started.
func (p *process) track() error {
	pid, err := p.lib.Pid()
	if err != nil {
		return err
	}
	// Nobody has waited for it yet, so the pid is still its own.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("open pidfd of %d: %w", pid, err)
	}
	p.pid, p.pidfd = pid, os.NewFile(uintptr(fd), "pidfd")
	return nil
}

// signal returns unix.ESRCH when the process is gone.
func (p *process) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd == nil {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(int(p.pidfd.Fd()), sig, nil, 0)
}

// wait reaps the process and returns how it ended.
func (p *process) wait() exit {
	state, err := p.lib.Wait()
	e := exit{status: 255, at: time.Now()}
	if state != nil {
		e.status = exitStatus(state)
	} else if errors.Is(err, unix.ECHILD) {
		e.status = 128 + int32(unix.SIGKILL)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pidfd.Close()
	p.pidfd = nil
	return e
}

// finish tells everybody.
func (p *process) finish(e exit) {
	p.exit = e
	p.io.in.close()
	close(p.done)
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// exitStatus is the exit code, or 128 plus the signal's number.
func exitStatus(state *os.ProcessState) int32 {
	ws, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case !ok:
		return 255
	case ws.Signaled():
		return 128 + int32(ws.Signal())
	}
	return int32(ws.ExitStatus())
}

// newProcess describes a process for libcontainer.
func newProcess(spec *specs.Process) (*libcontainer.Process, error) {
	p := &libcontainer.Process{
		Args:            spec.Args,
		Env:             spec.Env,
		UID:             int(spec.User.UID),
		GID:             int(spec.User.GID),
		Cwd:             spec.Cwd,
		NoNewPrivileges: &spec.NoNewPrivileges,
	}
	for _, g := range spec.User.AdditionalGids {
		p.AdditionalGroups = append(p.AdditionalGroups, int(g))
	}
	if b := spec.ConsoleSize; b != nil {
		p.ConsoleHeight, p.ConsoleWidth = uint16(b.Height), uint16(b.Width)
	}
	if c := spec.Capabilities; c != nil {
		p.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Inheritable: c.Inheritable,
			Permitted: c.Permitted, Ambient: c.Ambient,
		}
	}
	for _, l := range spec.Rlimits {
		kind, ok := rlimits[l.Type]
		if !ok {
			return nil, invalid("rlimit %q", l.Type)
		}
		p.Rlimits = append(p.Rlimits, configs.Rlimit{Type: kind, Hard: l.Hard, Soft: l.Soft})
	}
	return p, nil
}

// checkProcess refuses what libcontainer would misunderstand.
func checkProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return invalid("process is missing")
	case len(p.Args) == 0:
		return invalid("process has no arguments")
	case len(p.Args) > maxStrings || len(p.Env) > maxStrings:
		return invalid("process has %d arguments and %d variables", len(p.Args), len(p.Env))
	case len(p.Cwd) == 0 || p.Cwd[0] != '/':
		return invalid("working directory %q is not absolute", p.Cwd)
	}
	if b := p.ConsoleSize; b != nil {
		return checkWinsize(b.Height, b.Width)
	}
	return nil
}

func checkWinsize[T uint | uint32](rows, columns T) error {
	if rows > 0xffff || columns > 0xffff {
		return invalid("terminal of %d rows and %d columns", rows, columns)
	}
	return nil
}

var rlimits = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU,
	"RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE,
	"RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}
