// Package boot is the first process of the guest. It makes a Linux system of
// an initramfs, starts the agent as its child, reaps orphans, and powers off
// when the agent is gone, for whatever reason. In order:
//
//  1. leave rootfs, so that containers can pivot_root;
//  2. mount what the next steps need, load the modules of the index' boot line;
//  3. mount the rest, hand down cgroup controllers, loopback, limits;
//  4. start the agent, with its output going to the console through here;
//  5. beside it: load drivers for devices that are there or come later, keep
//     the clock, wait for the power button;
//  6. wait for children until the agent ends, then kill, unmount, power off.
//
// Only this process waits for orphans; the agent waits for its own children.
// The goroutines of step 5 end with the machine.
package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"syscall"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/guest/module"
)

// Run is the life of the first process: it returns only if the machine can't
// be powered off. The agent is this same binary with the arguments args.
func Run(ctx context.Context, args ...string) {
	out := newConsole(os.Stdout)
	log.G(ctx).Logger.SetOutput(out)
	defer powerOff(ctx, out)
	defer func() {
		if p := recover(); p != nil {
			log.G(ctx).WithField("stack", string(debug.Stack())).Errorf("first process: panic: %v", p)
		}
	}()
	if err := run(ctx, out, args); err != nil {
		log.G(ctx).WithError(err).Error("guest ends")
	}
}

func run(ctx context.Context, out io.Writer, args []string) error {
	trivial, err := isTrivial()
	if err != nil || trivial {
		return err
	}
	if err := switchRoot(); err != nil {
		return err
	}
	if err := mountAll(early); err != nil {
		return err
	}
	modules, err := module.Open(module.Dir)
	if err != nil {
		return err
	}
	if err := modules.Boot(); err != nil {
		log.G(ctx).WithError(err).Warn("modules missing")
	}
	if err := mountAll(late); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"device links", makeLinks},
		{"cgroup controllers", enableControllers},
		{"loopback", loopbackUp},
		{"hostname", func() error { return unix.Sethostname([]byte("localhost")) }},
		{"sysctls", setSysctls},
		{"limits", setLimits},
	} {
		if err := step.do(); err != nil {
			log.G(ctx).WithError(err).Warnf("set up %s", step.name)
		}
	}
	agent, err := start(out, args)
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	go watchDevices(ctx, modules)
	go watchPowerButton(ctx, agent)
	go keepClock(ctx, modules)
	return reap(agent)
}

// isTrivial does all that is wanted of a trivial init, before anything else.
func isTrivial() (bool, error) {
	proc := early[0]
	if err := proc.mount(); err != nil {
		return false, err
	}
	params, _ := ReadParams() // the agent tells what is wrong
	if params.Trivial {
		_, err := io.WriteString(os.Stdout, TrivialLine)
		return true, err
	}
	return false, unix.Unmount(proc.target, 0)
}

// start runs the agent with its output copied to out. The pipe makes a console
// that nobody reads this process' problem, not the agent's.
func start(out io.Writer, args []string) (pid int, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer w.Close()
	const self = "/proc/self/exe"
	pid, err = syscall.ForkExec(self, append([]string{"vmshim-agent"}, args...), &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
		Files: []uintptr{os.Stdin.Fd(), w.Fd(), w.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		r.Close()
		return 0, err
	}
	go func() { // ends with the last holder of the pipe
		defer r.Close()
		_, _ = io.Copy(out, r) // a lost log line is no reason to stop
	}()
	return pid, nil
}

// reap waits for every child until the agent ends, and says how it ended.
func reap(agent int) error {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid == agent && status.Exited() && status.ExitStatus() == 0:
			return nil
		case pid == agent && status.Signaled():
			return fmt.Errorf("agent killed by %v", status.Signal())
		case pid == agent:
			return fmt.Errorf("agent exited with status %d", status.ExitStatus())
		}
	}
}
