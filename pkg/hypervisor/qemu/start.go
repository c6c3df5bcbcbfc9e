package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// qmpSocket is the name of QEMU's QMP socket in the sandbox's directory. QEMU
// holds it listening, so that a later process can connect after this one.
const qmpSocket = "qmp"

// Start runs the machine. It returns when QEMU answers on QMP and the vCPUs
// run; the guest is then booting, or goes on from a template. On error or cancel
// nothing is left, and the error has what QEMU and its helpers said; a
// *TemplateError is that of a machine which could still boot.
func Start(ctx context.Context, spec hypervisor.Spec, opts Options) (*VM, error) {
	if err := opts.validate(spec); err != nil {
		return nil, fmt.Errorf("start machine: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	user, err := opts.Config.user(opts.Host.Accelerator)
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	vm := newVM(spec, opts)
	vm.user = user
	if err := vm.boot(ctx); err != nil {
		vm.fail("start: " + err.Error())
		vm.bury()
		return nil, fmt.Errorf("start machine: %w", vm.startError(ctx, err))
	}
	go vm.bury() // it closes Done
	return vm, nil
}

func newVM(spec hypervisor.Spec, opts Options) *VM {
	return &VM{
		spec: spec, opts: opts,
		launcher: launcher{
			env:      append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}, opts.Env...),
			cgroupFD: opts.CgroupFD, started: opts.Started,
		},
		resized: make(chan struct{}, 1), migrated: make(chan string, 1), askAgain: askAgain, silence: silence, settle: settle,
		scsiTurn: newTurn(), cpuTurn: newTurn(), memoryTurn: newTurn(),
		deaf: make(chan struct{}), down: make(chan struct{}), done: make(chan struct{}),
	}
}

// startError prefers the cause over what it broke: a process that ended over
// the connection that ended with it.
func (vm *VM) startError(ctx context.Context, err error) error {
	vm.mu.Lock()
	exit := vm.exitErrorLocked()
	vm.mu.Unlock()
	var template *TemplateError
	switch {
	case errors.Is(err, errGone) && errors.As(err, &template):
		return &TemplateError{template.Path, exit}
	case errors.Is(err, errGone):
		return exit
	case ctx.Err() != nil && len(exit.Output) > 0:
		return fmt.Errorf("%w; output: %s", err, strings.Join(exit.Output, " | "))
	}
	return err
}

// boot takes the steps of Start. What it acquires for QEMU is closed here,
// what it acquires for the machine by bury.
func (vm *VM) boot(ctx context.Context) error {
	ctx, cancel := vm.bound(ctx)
	defer cancel()
	var files cleanup.Stack // the parent's copies
	defer files.Run()       //nolint:errcheck // closing what was only handed over
	qemu := command{role: roleQEMU, path: vm.opts.Host.QEMU, user: vm.user, flags: isolation()}
	give := func(f *os.File) int {
		files.Add(f.Close)
		return qemu.files.add(f)
	}

	var fd descriptors
	if err := vm.openImages(&fd, give); err != nil {
		return err
	}
	template, err := vm.openTemplate()
	if err != nil {
		return err
	}
	if template != nil {
		defer template.Close()
	}
	late := template != nil || vm.opts.making // shares and vsock come when QEMU runs
	if !late {
		if err := vm.openShares(&fd, give); err != nil {
			return err
		}
	}
	back, err := vm.openVsock(ctx) // waits, beside virtiofsd's start
	if err != nil {
		return err
	}
	var filling errgroup.Group // beside the start of QEMU
	if late {
		defer back.Close()
		if vm.ram, err = makeMemory(vm.spec); err != nil {
			return err
		}
		if vm.opts.making { // it is still to be written
			vm.files.Add(vm.ram.Close)
		} else {
			defer vm.ram.Close()
		}
		fd.Memory = qemu.files.add(vm.ram)
	} else {
		fd.Vsock = give(back)
	}
	if template != nil {
		filling.Go(func() error { return vm.fill(ctx, template) })
		defer filling.Wait() //nolint:errcheck // it is only joined
	}
	console, far, err := newConsole(log.G(ctx))
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	vm.console = console
	fd.Console = give(far)

	listener, conn, err := vm.openQMP()
	if err != nil {
		return err
	}
	fd.QMP = give(listener)
	spec := vm.spec
	if late {
		spec.Shares = nil
		qemu.args = append(qemu.args, "-S")
	}
	if template != nil {
		qemu.args = append(qemu.args, "-incoming", "defer")
	}
	qemu.args = append(arguments(spec, vm.opts.Config, *vm.opts.Host, vm.cid, fd), qemu.args...)
	qemu.args = append(qemu.args, vm.opts.extra...)
	vm.cmdline = append([]string{qemu.path}, qemu.args...)
	if _, err := vm.start(qemu); err != nil {
		conn.Close()
		return err
	}
	// From here on QEMU alone holds the listener: when it dies, the connection
	// ends, accepted or not.
	if err := files.Run(); err != nil {
		conn.Close()
		return err
	}
	if vm.qmp, err = qmp.Connect(ctx, conn, vm.event); err != nil {
		return vm.orGone(ctx, err)
	}
	vm.watchers.Go(vm.watchQMP)
	if !late {
		return nil
	}
	if err := filling.Wait(); err != nil {
		return &TemplateError{template.Name(), err}
	}
	return vm.assemble(ctx, template, back)
}

// orGone waits a moment for the end of a process that would explain the error.
func (vm *VM) orGone(ctx context.Context, err error) error {
	select {
	case <-vm.down:
		return vm.goneErr()
	case <-ctx.Done():
	case <-time.After(dyingTimeout):
	}
	return err
}

// openVsock returns what is QEMU's end of the guest's vsock, and listens for the
// guest.
func (vm *VM) openVsock(ctx context.Context) (*os.File, error) {
	if vm.opts.Host.Vsock == VsockKernel {
		device, cid, err := openVhostVsock(randomCID)
		if err != nil {
			return nil, fmt.Errorf("vsock: %w", err)
		}
		vm.cid, vm.dial = cid, vsock.Kernel(cid)
		if vm.doorbell, err = listenKernel(cid); err != nil {
			device.Close()
			return nil, err
		}
		vm.watchers.Go(vm.doorbell.serve)
		return device, nil
	}

	dir, uid := filepath.Join(vm.opts.Dir, vsockDir), os.Geteuid()
	if vm.user != nil {
		uid = int(vm.user.Uid)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	vm.files.Add(remove(dir))
	if err := os.Chown(dir, uid, uid); err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	bell, err := listenHybrid(vm.streams(), uid)
	if err != nil {
		return nil, err
	}
	vm.doorbell = bell
	vm.watchers.Go(vm.doorbell.serve)
	conn, err := vm.startVhostDeviceVsock(ctx)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	vm.dial = vm.whenDriven(vsock.Hybrid(vm.streams()))
	return conn, nil
}

func (vm *VM) openShares(fd *descriptors, give func(*os.File) int) error {
	for i, share := range vm.spec.Shares {
		_, conn, err := vm.startVirtiofsd(fmt.Sprintf("fs%d", i), share, false)
		if err != nil {
			return fmt.Errorf("share %s: %w", share.Tag, err)
		}
		fd.Shares = append(fd.Shares, give(conn))
	}
	return nil
}

func (vm *VM) openImages(fd *descriptors, give func(*os.File) int) error {
	kernel, err := openReadable("kernel", vm.spec.Kernel, vm.user != nil)
	if err != nil {
		return err
	}
	fd.Kernel = give(kernel)
	initrd, err := openReadable("initrd", vm.spec.Initrd, vm.user != nil)
	if err != nil {
		return err
	}
	fd.Initrd = give(initrd)
	for _, disk := range vm.spec.Disks {
		f, block, err := openDisk(disk)
		if err != nil {
			return fmt.Errorf("disk %s: %w", disk.ID, err)
		}
		fd.Disks = append(fd.Disks, diskDescriptor{FD: give(f), Block: block})
	}
	return nil
}

// openQMP makes the listening socket for QEMU and the connection to it, which
// waits in its backlog.
func (vm *VM) openQMP() (listener *os.File, conn *net.UnixConn, err error) {
	path := filepath.Join(vm.opts.Dir, qmpSocket)
	l, err := listenUnix(path)
	if err != nil {
		return nil, nil, fmt.Errorf("qmp: %w", err)
	}
	l.SetUnlinkOnClose(false)
	vm.files.Add(remove(path))
	defer l.Close()
	conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("qmp: %w", err)
	}
	if listener, err = l.File(); err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("qmp: %w", err)
	}
	return listener, conn, nil
}
