package qemu

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Examine ends the machine when a helper lives on without doing its work, which
// no event tells: vhost-device-vsock has a thread that serves the device's
// queues, and can lose it. The first call, when the machine works, learns which
// threads there are.
func (vm *VM) Examine() {
	for _, running := range vm.Processes() {
		if running.Role != roleVsock {
			continue
		}
		now := threadNames(running.PID)
		// A process that is about to be reaped has none at all, and its end is told.
		if lost := missingNames(vm.learnThreads(running.PID, now), now); len(now) > 0 && len(lost) > 0 {
			vm.fail(running.Role + " lost its thread " + strings.Join(lost, ", "))
		}
	}
}

// learnThreads returns the threads that a process had at first.
func (vm *VM) learnThreads(pid int, now []string) []string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for _, p := range vm.processes {
		if p.PID == pid {
			if p.threads == nil {
				p.threads = now
			}
			return p.threads
		}
	}
	return nil
}

// threadNames lists the names of a process' threads, sorted.
func threadNames(pid int) []string {
	files, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task", "*", "comm"))
	var names []string
	for _, file := range files {
		if name, err := os.ReadFile(file); err == nil {
			names = append(names, strings.TrimSuffix(string(name), "\n"))
		}
	}
	slices.Sort(names)
	return names
}

// missingNames are those of was that are not in is; both may repeat.
func missingNames(was, is []string) (missing []string) {
	is = slices.Clone(is)
	for _, name := range was {
		if i := slices.Index(is, name); i >= 0 {
			is = slices.Delete(is, i, i+1)
		} else {
			missing = append(missing, name)
		}
	}
	return missing
}
