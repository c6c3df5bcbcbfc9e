// Command kvmhost runs a command on a host with KVM, kernel vsock, vhost-net and
// control groups of version 2, whatever machine it is called on: in a virtual
// machine whose processor has AMD's SVM, emulated where this one has no KVM
// either. It is meant for tests, and serves go test as its -exec.
//
//	kvmhost [flags] COMMAND [ARGUMENT…]
//
// The machine sees this one's root file system, or that of another release of
// Debian, and further directories at their own paths, read-only below layers that
// vanish with it: nothing that happens in it changes anything here, except the
// files that are asked for with -get. /tmp, /run and /var/lib are in memory.
//
// The command starts in the directory that kvmhost was called in, without
// standard input. Its output is copied as it comes; its exit status is kvmhost's
// (125: there was none). Environment: HOME, PATH, LANG, CI, XDG_CACHE_HOME and
// what begins with VMSHIM_ or GO.
//
// Everything on this machine lives in a pid and a mount namespace of kvmhost's
// child, and ends with it: by the kernel when kvmhost itself is killed.
//
// The same program is the machine's first process and its server.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vmshim/vmshim/internal/guest/boot"
	"github.com/vmshim/vmshim/internal/guest/module"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// What this program is called with when it is not called by a person.
const (
	machineMode = "machine" // the child with the namespaces
	serveMode   = "serve"   // in the machine
)

// filesFD is where the child writes the files that are asked for: this process
// stores them, whose root the child has left.
const filesFD = 3

// failed is the exit status when the command has none, as of docker run and
// others.
const failed = 125

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	mode := ""
	if len(args) > 1 {
		mode = args[1]
	}
	ctx := context.Background()
	switch {
	case filepath.Base(args[0]) == "modprobe":
		return module.Modprobe(args[1:])
	case mode == serveMode:
		return report(serve(ctx))
	case mode == machineMode:
		return report(machine(ctx, args[2:]))
	case os.Getpid() == 1:
		boot.Run(ctx, serveMode)
		return 1
	}
	return report(host(ctx, args))
}

// An exitStatus is how the command ended.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

func report(err error) int {
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case errors.Is(err, flag.ErrHelp):
		return 0
	}
	fmt.Fprintln(os.Stderr, "kvmhost:", err)
	if gone, ok := errors.AsType[*qemu.ExitError](err); ok {
		fmt.Fprintf(os.Stderr, "%+v", gone)
	}
	return failed
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

type options struct {
	release  string
	root     string // of the release; found, not given
	emulator string // the root that has the QEMU; found, too
	image    string
	vsock    string
	memory   int
	cpus     int
	timeout  time.Duration
	again    int
	share    list
	get      list
	args     []string
}

func parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("kvmhost", flag.ContinueOnError)
	flags.StringVar(&o.release, "host", "", "Debian `release` whose programs the machine has; empty: this machine's own")
	flags.StringVar(&o.image, "image", "", "`directory` with the machine's kernel and initramfs (make kvm-host-image)")
	flags.StringVar(&o.vsock, "vhost-device-vsock", "", "`binary` of vhost-device-vsock, where this machine has no vsock")
	flags.IntVar(&o.memory, "memory", 3072, "the machine's memory in `MiB`; it costs what is used of it")
	flags.IntVar(&o.cpus, "cpus", 2, "the machine's `CPUs`")
	flags.DurationVar(&o.timeout, "timeout", 30*time.Minute, "the machine is killed after this `time`")
	flags.IntVar(&o.again, "again", 0, "when the machine is lost, as by a panic of its kernel, run the command in another one, up to so many `times`")
	flags.Var(&o.share, "share", "another `directory` that the machine is to see; may be repeated")
	flags.Var(&o.get, "get", "`pattern` of files that are copied back; may be repeated")
	flags.StringVar(&o.root, "root", "", "`directory` of the release; empty: made by mmdebstrap, and kept")
	flags.StringVar(&o.emulator, "emulator", "", "`directory` of the release whose QEMU emulates the machine; empty: this machine's own where KVM can be nested, or of Debian 13, made likewise")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	o.args = flags.Args()
	if len(o.args) == 0 || o.image == "" {
		return o, errors.New("usage: kvmhost -image DIR [flags] COMMAND [ARGUMENT…]; kvmhost -h lists the flags")
	}
	return o, nil
}

// files are the patterns of what is asked for, absolute.
func (o options) files(dir string) (patterns []string) {
	for _, pattern := range o.get {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(dir, pattern)
		}
		patterns = append(patterns, pattern)
	}
	return patterns
}

// host finds the root file system and starts the child.
func host(ctx context.Context, args []string) error {
	o, err := parse(args[1:])
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root, for namespaces and read-only mounts")
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if o.root == "" {
		if o.root, err = releaseRoot(ctx, o.release); err != nil {
			return err
		}
	}
	if o.emulator == "" {
		if o.emulator, err = emulatorRoot(ctx); err != nil {
			return err
		}
	}
	for attempt := 1; ; attempt++ {
		lost, err := attemptOn(ctx, o, args[1:])
		if !lost || attempt > o.again || ctx.Err() != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "kvmhost: the machine was lost; running the command in another one (%d of %d)\n", attempt, o.again)
	}
}

// attemptOn runs the command in a machine of a child.
func attemptOn(ctx context.Context, o options, args []string) (lost bool, err error) {
	runtime.LockOSThread() // the child dies with the thread that started it
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{machineMode, "-root=" + o.root, "-emulator=" + o.emulator}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	dir, err := os.Getwd()
	if err != nil {
		return false, err
	}
	files, child, err := os.Pipe()
	if err != nil {
		return false, err
	}
	cmd.ExtraFiles = []*os.File{child}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // a terminal's Ctrl-C comes by way of this process
	}
	err = cmd.Start()
	child.Close()
	if err != nil {
		files.Close()
		return false, err
	}
	lost, unstored := storeAll(files, o.files(dir))
	files.Close()    // the child ends at its next write, if there is one
	err = cmd.Wait() // of whose namespace nobody is left when it returns
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("interrupted: %w", context.Cause(ctx))
	case unstored != nil:
		err = unstored
	case errors.As(err, &exit) && exit.Exited():
		err = exitStatus(exit.ExitCode())
	}
	return lost, err
}
