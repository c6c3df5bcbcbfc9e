package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A child is the agent's process.
type child struct {
	pid     int
	drained chan struct{} // closed when all that it wrote was taken
}

// start runs this binary again, with its output copied to out. The pipe makes a
// console that nobody reads this process' problem, not the agent's. In devmode
// an agent that crashes tells what all its threads did, and dumps core where its
// limits permit.
func start(out io.Writer, args []string, devMode bool) (child, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return child{}, err
	}
	defer w.Close()
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	if devMode {
		env = append(env, "GOTRACEBACK=crash")
	}
	pid, err := syscall.ForkExec("/proc/self/exe", append([]string{"vmshim-agent"}, args...), &syscall.ProcAttr{
		Dir:   "/",
		Env:   env,
		Files: []uintptr{os.Stdin.Fd(), w.Fd(), w.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		r.Close()
		return child{}, err
	}
	// Any container is worth less than the agent. (They get a score of their own.)
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("-999"), 0)
	c := child{pid: pid, drained: make(chan struct{})}
	go func() { // ends with the last holder of the pipe
		defer close(c.drained)
		defer r.Close()
		_, _ = io.Copy(out, r) // a lost log line is no reason to stop
	}()
	return c, nil
}

// reap waits for every process that has no other parent until the agent ends,
// says how that was, and sees to it that its last words are heard.
func (c child) reap() error {
	err := reapUntil(c.pid)
	select {
	case <-c.drained:
	case <-time.After(flushTimeout): // a process it left has the pipe
	}
	return err
}

func reapUntil(agent int) error {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid != agent:
		case status.Signaled():
			return fmt.Errorf("agent ended by signal: %v", status.Signal())
		case status.ExitStatus() != 0:
			return fmt.Errorf("agent exited with status %d", status.ExitStatus())
		default:
			return nil
		}
	}
}
