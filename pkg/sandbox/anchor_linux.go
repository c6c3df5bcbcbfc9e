package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/pause"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// An anchor is the task process of a container: what the host has of it. It
// lives in the pod's network namespace and sees the container's root file
// system as its root, for whoever looks at /proc/PID. It does nothing, and its
// end means nothing.
type anchor struct {
	hypervisor.Process
	cmd  *exec.Cmd
	done chan struct{} // closed when it was reaped
}

// anchorPlan is what the anchor's process is told.
type anchorPlan struct {
	Name       string                 `json:"name"`
	Root       string                 `json:"root"`
	Hostname   string                 `json:"hostname,omitempty"`
	Namespaces []specs.LinuxNamespace `json:"namespaces"`
}

// anchorReport is the number of the file on which it reports what failed.
const anchorReport = 3

// startAnchor runs this program as AnchorMain. The process is given to started
// before anything else happens. On error it is gone.
func startAnchor(ctx context.Context, plan anchorPlan, env string, started func(hypervisor.Process) error) (_ *anchor, err error) {
	arg, err := json.Marshal(plan)
	if err != nil {
		return nil, fmt.Errorf("start task process: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start task process: %w", err)
	}
	defer r.Close()
	// Not bound to ctx: the anchor lives on.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "/proc/self/exe", "anchor", string(arg))
	cmd.Env = []string{env}
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return nil, fmt.Errorf("start task process: %w", err)
	}
	a := &anchor{cmd: cmd, done: make(chan struct{})}
	go func() { // joined by stop
		defer close(a.done)
		_ = cmd.Wait()
	}()
	defer func() {
		if err != nil {
			a.stop()
			err = fmt.Errorf("start task process: %w", err)
		}
	}()
	if a.Process, err = processOf("task", cmd.Process.Pid); err != nil {
		return nil, err
	}
	if err := started(a.Process); err != nil {
		return nil, err
	}
	return a, awaitAnchor(ctx, r)
}

// awaitAnchor reads the report: its end without a word means that the process
// is what it shall be.
func awaitAnchor(ctx context.Context, r *os.File) error {
	stop := context.AfterFunc(ctx, func() { _ = r.Close() })
	defer stop()
	text, err := io.ReadAll(io.LimitReader(r, 4<<10))
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case len(text) > 0:
		return errors.New(string(text))
	}
	return nil
}

// stop ends the anchor and waits for its end.
func (a *anchor) stop() {
	_ = a.cmd.Process.Kill()
	<-a.done
}

// AnchorMain is what the command that owns a sandbox does when it is called
// with the argument "anchor": args are those behind it. It becomes the task
// process of a container and returns, with an exit code, only when that fails.
func AnchorMain(args []string) int {
	unix.CloseOnExec(anchorReport)
	if err := becomeAnchor(args); err != nil {
		_, _ = fmt.Fprint(os.NewFile(anchorReport, "report"), err)
	}
	return 1
}

func becomeAnchor(args []string) error {
	var plan anchorPlan
	if len(args) != 1 {
		return fmt.Errorf("%d arguments", len(args))
	}
	if err := json.Unmarshal([]byte(args[0]), &plan); err != nil {
		return err
	}
	// Before the namespaces change: /proc is out of reach afterwards.
	program, err := pause.Open("vmshim-anchor")
	if err != nil {
		return err
	}
	runtime.LockOSThread() // namespaces are a thread's, and exec keeps this one's
	if err := enterNamespaces(plan); err != nil {
		return err
	}
	if err := changeRoot(plan.Root); err != nil {
		return err
	}
	return execFile(program, []string{plan.Name}, os.Environ())
}

// anchorNamespaces are those that somebody may want to join by the task's pid.
// What else a container has of its own is in the guest.
var anchorNamespaces = map[specs.LinuxNamespaceType]int{
	specs.NetworkNamespace: unix.CLONE_NEWNET,
	specs.UTSNamespace:     unix.CLONE_NEWUTS,
	specs.IPCNamespace:     unix.CLONE_NEWIPC,
}

// enterNamespaces joins namespaces that have a path and makes the others.
func enterNamespaces(plan anchorPlan) error {
	flags := unix.CLONE_NEWNS
	named := false
	for _, ns := range plan.Namespaces {
		kind, ok := anchorNamespaces[ns.Type]
		switch {
		case !ok:
		case ns.Path == "":
			flags |= kind
			named = named || ns.Type == specs.UTSNamespace
		default:
			if err := joinNamespace(ns.Path, kind); err != nil {
				return fmt.Errorf("join %s namespace %q: %w", ns.Type, ns.Path, err)
			}
		}
	}
	if err := unix.Unshare(flags); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if named && plan.Hostname != "" {
		if err := unix.Sethostname([]byte(plan.Hostname)); err != nil {
			return fmt.Errorf("set hostname %q: %w", plan.Hostname, err)
		}
	}
	return nil
}

func joinNamespace(path string, kind int) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, kind)
}

// changeRoot makes root the root of the calling thread's new mount namespace,
// with nothing else mounted in it.
func changeRoot(root string) error {
	for _, step := range []struct {
		name string
		do   func() error
	}{
		// What is mounted and unmounted here is nobody else's business.
		{"make mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		{"bind root", func() error { return unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, "") }},
		{"enter root", func() error { return unix.Chdir(root) }},
		{"pivot_root", func() error { return unix.PivotRoot(".", ".") }},
		// "." is now the old root, mounted upon the new one: pivot_root(2).
		{"unmount old root", func() error { return unix.Unmount(".", unix.MNT_DETACH) }},
		{"enter new root", func() error { return unix.Chdir("/") }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s %q: %w", step.name, root, err)
		}
	}
	return nil
}

// execFile replaces this process by the program in an open file.
func execFile(fd int, argv, env []string) error {
	path, err := unix.BytePtrFromString("")
	if err != nil {
		return err
	}
	argp, err := syscall.SlicePtrFromStrings(argv)
	if err != nil {
		return err
	}
	envp, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(path)),
		uintptr(unsafe.Pointer(&argp[0])), uintptr(unsafe.Pointer(&envp[0])), unix.AT_EMPTY_PATH, 0)
	return os.NewSyscallError("execveat", errno)
}
