package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
)

// start runs a process of the machine and watches it.
func (vm *VM) start(c command) (*process, error) {
	if vm.isDown() {
		return nil, vm.goneErr()
	}
	p, err := vm.launcher.start(c)
	if err != nil {
		return nil, err
	}
	vm.mu.Lock()
	vm.processes = append(vm.processes, p)
	if c.role == roleQEMU {
		vm.qemu = p
	}
	failed := vm.failed
	vm.mu.Unlock()
	if failed { // whoever closed down did not see it
		p.kill()
	}
	vm.watchers.Go(func() { vm.watch(p) })
	return p, nil
}

// setOptional says whether the machine lives on when the process ends. It is
// too late to need a process that has ended.
func (vm *VM) setOptional(p *process, optional bool) (ok bool) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	select {
	case <-p.done:
		ok = optional
	default:
		ok = true
	}
	if ok {
		p.optional = optional
	}
	return ok
}

func (vm *VM) isOptional(p *process) bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return p.optional
}

// dismiss waits for the end of a process that has nothing to do any more, and
// helps when that takes long.
func (vm *VM) dismiss(ctx context.Context, p *process) {
	vm.setOptional(p, true)
	select {
	case <-p.done:
	case <-ctx.Done():
		p.kill()
	case <-time.After(dyingTimeout):
		p.kill()
	}
	<-p.done
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.processes = slices.DeleteFunc(vm.processes, func(q *process) bool { return q == p })
}

func (vm *VM) isDown() bool {
	select {
	case <-vm.down:
		return true
	default:
		return false
	}
}

// grace is how much later the cause may be seen than what it caused: QEMU's end
// than a helper's, or than that of the QMP connection. dyingTimeout is that for
// a QEMU which ends in good order: it lets its helpers go, which end in good
// order too, before it gives the guest's memory back.
const (
	grace        = 50 * time.Millisecond
	dyingTimeout = 2 * time.Second
)

// watch waits for a process to end, and ends the machine with it.
func (vm *VM) watch(p *process) {
	<-p.done
	if p.Role == roleQEMU {
		select { // its last event may still be unread
		case <-vm.deaf:
		case <-time.After(grace):
		}
		vm.fail(vm.qemuState(p))
		return
	}
	if qemu := vm.theQEMU(); qemu != nil {
		patience := grace
		if p.err == nil {
			patience = dyingTimeout
		}
		select {
		case <-qemu.done:
			return
		case <-vm.down:
			return
		case <-time.After(patience):
		}
	}
	if vm.isOptional(p) {
		return
	}
	vm.fail(p.Role + " ended: " + p.end())
}

func (vm *VM) theQEMU() *process {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.qemu
}

// shutdownStates are the words for QEMU's reasons to shut down by itself (type
// ShutdownCause in qapi/run-state.json).
var shutdownStates = map[string]string{
	"guest-shutdown": "guest powered off",
	"guest-reset":    "guest reset itself",
	"guest-panic":    "guest panicked",
	"host-signal":    "qemu ended by a signal",
	"host-qmp-quit":  "qemu was told to quit",
	"host-error":     "qemu had an error",
}

func (vm *VM) qemuState(p *process) string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if state, ok := shutdownStates[vm.shutdown]; ok && p.err == nil {
		return state
	}
	return "qemu ended: " + p.end()
}

// event is called by the QMP client.
func (vm *VM) event(e qmp.Event) {
	vm.plugs.event(e)
	vm.mu.Lock()
	defer vm.mu.Unlock()
	switch e.Name {
	case "MEMORY_DEVICE_SIZE_CHANGE":
		select {
		case vm.resized <- struct{}{}:
		default:
		}
	case "MIGRATION":
		var data struct{ Status string }
		if json.Unmarshal(e.Data, &data) != nil || data.Status != "completed" && data.Status != "failed" {
			return
		}
		select {
		case vm.migrated <- data.Status:
		default:
		}
	case "SHUTDOWN":
		var data struct{ Reason string }
		if json.Unmarshal(e.Data, &data) == nil && vm.shutdown == "" {
			vm.shutdown = data.Reason
		}
	case "GUEST_PANICKED":
		vm.shutdown = "guest-panic"
	}
}

// exitTimeout is how long QEMU may live on when it has closed its QMP
// connection: it gives the guest's memory back.
const exitTimeout = 10 * time.Second

// watchQMP ends a machine that can't be commanded any more.
func (vm *VM) watchQMP() {
	<-vm.qmp.Done()
	close(vm.deaf)
	err := vm.qmp.Err()
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		select {
		case <-vm.down:
			return
		case <-time.After(exitTimeout):
		}
	}
	vm.fail("qmp connection ended: " + err.Error())
}

// fail ends the machine. The first to call it says why; the others are heard
// no more.
func (vm *VM) fail(state string) {
	vm.mu.Lock()
	first := !vm.failed
	if first {
		vm.failed, vm.wanted, vm.state = true, vm.asked, state
		close(vm.down)
	}
	processes := slices.Clone(vm.processes)
	vm.mu.Unlock()
	if !first {
		return
	}
	for _, p := range slices.Backward(processes) { // QEMU first
		p.kill()
	}
}

// bury waits for a machine that is down, and removes what is left of it.
func (vm *VM) bury() {
	<-vm.down
	vm.calls.Wait()
	for _, p := range vm.processes { // none is added any more
		<-p.done
	}
	if vm.qmp != nil {
		_ = vm.qmp.Close()
	}
	if vm.doorbell != nil {
		_ = vm.doorbell.close()
	}
	vm.watchers.Wait()
	if vm.console != nil {
		vm.console.close()
	}
	_ = vm.files.Run() // the sandbox's directory is removed as a whole, too
	vm.err = vm.reason()
	close(vm.done)
}

func (vm *VM) reason() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.wanted {
		return nil
	}
	return vm.exitErrorLocked()
}

func (vm *VM) exitErrorLocked() *ExitError {
	e := &ExitError{Name: vm.spec.Name, State: vm.state, Cmdline: vm.cmdline}
	for _, p := range vm.processes {
		for _, line := range tail(p.output.String(), consoleTail) {
			e.Output = append(e.Output, p.Role+": "+line)
		}
	}
	if vm.console != nil {
		e.Console = tail(vm.console.ring.String(), consoleTail)
		if vm.shutdown == "guest-reset" && len(lastWords(e.Console)) > 0 {
			e.State = "guest kernel panicked" // which made it reset itself
		}
	}
	if vm.doorbell != nil {
		select {
		case <-vm.doorbell.rung:
			e.Ready = true
		default:
		}
	}
	return e
}

// remove is an undo step for a file that may be gone already.
func remove(path string) func() error {
	return func() error {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
		return nil
	}
}
