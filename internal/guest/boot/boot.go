// Package boot is the first process of the guest. It makes a Linux system of
// an initramfs, starts the agent as its child, reaps orphans, and powers off
// when the agent is gone, for whatever reason. In order:
//
//  1. leave rootfs, so that containers can pivot_root;
//  2. mount what the next steps need, load the modules the agent needs;
//  3. mount the rest, hand down cgroup controllers, set limits;
//  4. start the agent, with its output going to the console through here;
//  5. beside it: loopback, drivers for devices that are there or come later,
//     wait for the power button, keep the clock;
//  6. wait for children until the agent ends, then kill, unmount, power off.
//
// Only this process waits for orphans; the agent waits for its own children.
// The goroutines of step 5 end with the machine.
package boot

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"time"

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
	params, err := readEarly()
	if err != nil {
		return err
	}
	if params.Trivial {
		_, err := io.WriteString(os.Stdout, TrivialLine)
		return err
	}
	SetLevel(log.G(ctx).Logger, params.Agent.LogLevel)
	var logs *logServer
	if params.Agent.LogPort != 0 {
		logs = newLogServer()
		out = io.MultiWriter(out, logs)
		log.G(ctx).Logger.SetOutput(out)
	}
	modules := module.New(module.Dir)
	if err := runTasks(ctx, []task{
		{"switch root", true, switchRoot},
		{"first mounts", true, func() error { return mountAll(early) }},
		{"modules", false, modules.LoadBoot},
		{"mounts", true, func() error { return mountAll(late) }},
		{"device links", false, makeLinks},
		{"cgroup controllers", false, enableControllers},
		{"hostname", false, func() error { return unix.Sethostname([]byte("localhost")) }},
		{"sysctls", false, setSysctls},
		{"limits", false, setLimits},
	}); err != nil {
		return err
	}
	if logs != nil {
		go logs.listen(ctx, params.Agent.LogPort)
	}
	agent, err := start(out, args, params.Agent.DevMode)
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	go afterwards(ctx, modules, agent.pid)
	return agent.reap()
}

// afterwards does what the agent need not wait for, while the processor has
// nothing else to do: at this time the agent and the host take turns.
func afterwards(ctx context.Context, modules *module.Loader, agent int) {
	runtime.LockOSThread()
	idle(true)
	if err := loopbackUp(); err != nil {
		log.G(ctx).WithError(err).Warn("set up loopback")
	}
	devices, err := listenDevices()
	if err != nil {
		log.G(ctx).WithError(err).Error("drivers of hot-plugged devices are not loaded")
	}
	loadPresent(ctx, modules)
	button, err := listenButton(modules)
	if err != nil {
		log.G(ctx).WithError(err).Warn("power button ignored")
	}
	idle(false)
	go button.watch(ctx, agent)
	go devices.watch(ctx, modules)
	keepClock(ctx, modules)
}

// A task of booting. Without the vital ones there is no guest.
type task struct {
	name  string
	vital bool
	do    func() error
}

func runTasks(ctx context.Context, tasks []task) error {
	for _, t := range tasks {
		begin := time.Now()
		err := t.do()
		switch {
		case err != nil && t.vital:
			return fmt.Errorf("%s: %w", t.name, err)
		case err != nil:
			log.G(ctx).WithError(err).Warnf("set up %s", t.name)
		default:
			log.G(ctx).WithField("took", time.Since(begin)).Debugf("set up %s", t.name)
		}
	}
	return nil
}

// readEarly reads the parameters before anything else is done: a trivial init
// is to do nothing else.
func readEarly() (Params, error) {
	proc := early[0]
	if err := proc.mount(); err != nil {
		return Params{}, err
	}
	params, _ := ReadParams() // the agent tells what is wrong
	return params, unix.Unmount(proc.target, 0)
}
