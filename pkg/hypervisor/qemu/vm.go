package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// A VM is a running machine: QEMU and its helpers, owned by this process.
type VM struct {
	spec     hypervisor.Spec
	opts     Options
	user     *syscall.Credential // of QEMU; nil: the caller
	launcher launcher
	cmdline  []string

	cid      uint32 // of the guest, with the kernel's vsock
	dial     vsock.Dialer
	doorbell *doorbell
	console  *console
	qmp      *qmp.Client

	files    cleanup.Stack  // what the machine has in the sandbox's directory
	watchers sync.WaitGroup // of processes, QMP and doorbell
	calls    sync.WaitGroup // that change the running machine; none begins after down
	plugs    plugs
	resized  chan struct{} // has an element when the size of memory may have changed
	askAgain time.Duration // of the package; shorter in tests
	silence  time.Duration // of the package; shorter in tests
	settle   time.Duration // of the package; shorter in tests
	migrated chan string   // has an element when the state was read or written, or was not
	restored bool          // from a template; set before Start returns
	ram      *os.File      // the guest's, of a machine that begins with a template or for one
	// Calls of a kind go one after the other: on the SCSI controller, CPUs, memory.
	scsiTurn, cpuTurn, memoryTurn turn

	deaf chan struct{} // closed when QMP has ended: no event comes any more
	down chan struct{} // closed by fail: the machine has ended or is to
	done chan struct{}
	err  error // why the machine is gone; valid after done

	mu        sync.Mutex
	processes []*process // guarded by mu; none is added after down
	qemu      *process   // guarded by mu; one of them
	failed    bool       // guarded by mu: down is closed
	state     string     // guarded by mu: what happened
	shutdown  string     // guarded by mu: QEMU's reason, from its event
	driven    time.Time  // guarded by mu: when the guest was first seen to drive its vsock
	asked     bool       // guarded by mu: the owner wants the machine to end
	wanted    bool       // guarded by mu: it was asked before it went down
}

// Ready is closed when the guest's agent said that it serves.
func (vm *VM) Ready() <-chan struct{} { return vm.doorbell.rung }

// Done is closed when the machine is gone: QEMU or a helper that it cannot do
// without has ended, and the rest was killed and reaped.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Err says why the machine is gone, as an *ExitError with the ends of the
// console and of QEMU's words; nil after Shutdown and Kill. Valid after Done.
func (vm *VM) Err() error { return vm.err }

// Console returns the last lines of the guest's console, quoted for a log.
func (vm *VM) Console() string {
	return strconv.Quote(strings.Join(tail(vm.console.ring.String(), consoleTail), "\n"))
}

// consoleTail is how many lines an error or a log gets: a panic with its trace.
const consoleTail = 80

// Processes lists the host processes of the machine.
func (vm *VM) Processes() []hypervisor.Process {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	var list []hypervisor.Process
	for _, p := range vm.processes {
		list = append(list, p.Process)
	}
	return list
}

// Cmdline is QEMU's command line, to reproduce what it did. Its numbers of
// descriptors mean something to that process only.
func (vm *VM) Cmdline() []string { return slices.Clone(vm.cmdline) }

// AgentURL names a port of the guest for another process: vsock://… or hvsock://….
func (vm *VM) AgentURL(port uint32) string {
	if vm.cid != 0 {
		return vsock.KernelURL(vm.cid, port)
	}
	return vsock.HybridURL(vm.streams(), port)
}

func (vm *VM) streams() string { return filepath.Join(vm.opts.Dir, vsockDir, vsockStreams) }

// errGone is the end of whatever is under way when a machine ends.
var errGone = errors.New("machine is gone")

// goneErr is errGone with what happened, of a machine that is down.
func (vm *VM) goneErr() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return fmt.Errorf("%w: %s: %w", errGone, vm.state, errdefs.ErrUnavailable)
}

// Dial opens a stream to a port of the guest. It ends with the machine.
func (vm *VM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	ctx, cancel := vm.bound(ctx)
	defer cancel()
	conn, err := vm.dial(ctx, port)
	if err != nil && vm.isDown() {
		return nil, fmt.Errorf("dial guest port %d: %w", port, vm.goneErr())
	}
	return conn, err
}

// bound makes a context that the machine's end cancels.
func (vm *VM) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-vm.down:
			cancel(vm.goneErr())
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		cancel(context.Canceled)
		watch.Wait()
	}
}

// Kill ends every process of the machine and returns when they are reaped.
func (vm *VM) Kill() error {
	vm.ask()
	vm.fail("killed")
	<-vm.done
	return nil
}

// defaultShutdown bounds a Shutdown whose context has no deadline.
const defaultShutdown = 10 * time.Second

// Shutdown waits for the guest to power off by itself (the agent was told so),
// asks by ACPI when it does not within half of the context's time, and kills in the end.
func (vm *VM) Shutdown(ctx context.Context) error {
	vm.ask()
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(defaultShutdown)
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	half := time.NewTimer(time.Until(deadline) / 2)
	defer half.Stop()
	select {
	case <-vm.done:
		return nil
	case <-ctx.Done():
	case <-half.C:
		if err := vm.qmp.Execute(ctx, "system_powerdown", nil, nil); err != nil {
			log.G(ctx).WithError(err).Debug("ask the guest to power off")
		}
	}
	select {
	case <-vm.done:
	case <-ctx.Done():
		log.G(ctx).WithField("console", vm.Console()).Warn("guest did not power off and is killed")
		return vm.Kill()
	}
	return nil
}

func (vm *VM) ask() {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.asked = true
}
