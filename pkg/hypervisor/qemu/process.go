package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// The roles of a machine's processes.
const (
	roleQEMU      = "qemu"
	roleVirtiofsd = "virtiofsd"
	roleVsock     = "vhost-device-vsock"
)

// stderrSize is what is kept of the words of one process.
const stderrSize = 8 << 10

// drainTimeout bounds the wait for the end of a dead process' output: a child
// of it may hold the other end.
const drainTimeout = 100 * time.Millisecond

// A command is a process to be.
type command struct {
	role  string
	path  string
	args  []string // without the name
	files inheritance
	user  *syscall.Credential // nil: as the caller
	flags uintptr             // namespaces of its own
	// optional: the machine does not end with it, at first.
	optional bool
}

// An inheritance is the list of files that a process gets. The caller keeps
// its own descriptors.
type inheritance []*os.File

// add returns the number that the file has in the process.
func (i *inheritance) add(f *os.File) int {
	*i = append(*i, f)
	return 2 + len(*i) // behind stdin, stdout, stderr
}

// A launcher starts the processes of one machine.
type launcher struct {
	env      []string
	cgroupFD int
	started  func(hypervisor.Process) error
}

// A process is a child, from its start until it is reaped. It is never found
// by a pid that somebody else may have got: os.Process holds a pidfd.
type process struct {
	hypervisor.Process
	cmd    *exec.Cmd
	output *ring
	done   chan struct{} // closed when it is reaped and its output read
	err    error         // how it ended; valid after done

	optional bool     // guarded by VM.mu: the machine does not end with it
	threads  []string // guarded by VM.mu: of Examine
}

// start runs a command. The process is on record (launcher.started) before
// start returns; when that fails there is no process.
func (l *launcher) start(c command) (*process, error) {
	p, err := l.run(c, c.path)
	if errors.Is(err, unix.EACCES) && c.user != nil {
		// The user may execute the file, but not walk to it.
		binary, oerr := os.OpenFile(c.path, unix.O_PATH, 0)
		if oerr != nil {
			return nil, fmt.Errorf("start %s: %w", c.role, oerr)
		}
		defer binary.Close()
		c.files = slices.Clone(c.files)
		if q, qerr := l.run(c, fdPath(c.files.add(binary))); qerr == nil {
			p, err = q, nil
		} else {
			err = fmt.Errorf("%w (as user %d)", err, c.user.Uid)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.role, err)
	}
	if l.started != nil {
		if err := l.started(p.Process); err != nil {
			p.kill()
			<-p.done
			return nil, fmt.Errorf("record %s: %w", c.role, err)
		}
	}
	return p, nil
}

func (l *launcher) run(c command, path string) (*process, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	cmd := &exec.Cmd{
		Path:       path,
		Args:       append([]string{c.path}, c.args...),
		Env:        l.env,
		Dir:        "/",
		Stdout:     w,
		Stderr:     w,
		ExtraFiles: c.files,
		SysProcAttr: &syscall.SysProcAttr{
			Credential: c.user,
			Cloneflags: c.flags,
			Setsid:     true, // a terminal's signals are not for it
		},
	}
	if l.cgroupFD > 0 {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, l.cgroupFD
	}
	if err := cmd.Start(); err != nil {
		r.Close()
		return nil, err
	}
	p := &process{
		Process: hypervisor.Process{Role: c.role, PID: cmd.Process.Pid, StartTime: startTime(cmd.Process.Pid)},
		cmd:     cmd,
		output:  newRing(stderrSize),
		done:    make(chan struct{}),

		optional: c.optional,
	}
	go p.watch(r) // joined by whoever waits for done
	return p, nil
}

func (p *process) watch(output *os.File) {
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(p.output, output)
	}()
	p.err = p.cmd.Wait()
	_ = output.SetReadDeadline(time.Now().Add(drainTimeout))
	<-read
	output.Close()
	close(p.done)
}

// kill ends the process. A virtiofsd that made itself a pid namespace is the
// parent of the one that works, and ends with it: killed first, it would leave
// the other to the host's init.
func (p *process) kill() {
	if p.killChildren() {
		time.AfterFunc(drainTimeout, func() { _ = p.cmd.Process.Kill() })
		return
	}
	_ = p.cmd.Process.Kill() // fails when it is dead already
}

func (p *process) killChildren() (killed bool) {
	for _, pid := range children(p.PID) {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		// It is our child's child if it still is after it can't be mistaken any more.
		if slices.Contains(children(p.PID), pid) && p.cmd.Process.Signal(syscall.Signal(0)) == nil {
			killed = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil || killed
		}
		unix.Close(fd)
	}
	return killed
}

// end says how the process ended. Valid after done.
func (p *process) end() string {
	var exit *exec.ExitError
	switch {
	case p.err == nil:
		return "exit status 0"
	case errors.As(p.err, &exit):
		return exit.String()
	}
	return p.err.Error()
}

// children lists the direct children of a process that is not reaped yet.
func children(pid int) []int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	var pids []int
	for field := range bytes.FieldsSeq(text) {
		if pid, err := strconv.Atoi(string(field)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// startTime reads field 22 of /proc/PID/stat, see proc(5): the fields behind
// the name, which may hold blanks and parentheses, begin with the third.
func startTime(pid int) uint64 {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0
	}
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0
	}
	ticks, _ := strconv.ParseUint(string(fields[19]), 10, 64)
	return ticks
}
