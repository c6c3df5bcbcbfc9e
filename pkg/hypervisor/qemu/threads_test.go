package qemu

import (
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	threadBehaviour = "thread" // of the fake vsock daemon: as serve, with a thread that SIGUSR1 ends
	workerName      = "vring_test"
)

func runThread() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, unix.SIGUSR1)
	named := make(chan struct{})
	var work func()
	work = func() {
		runtime.LockOSThread()              // and never unlocked: the thread ends with its goroutine
		if unix.Gettid() == unix.Getpid() { // but for the first one, which Go keeps
			go work()
			<-named
			return
		}
		name := []byte(workerName + "\x00")
		_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
		close(named)
		<-end
	}
	go work()
	<-named
}

// A helper that lives on without one of its threads takes the machine down.
func TestExamine(t *testing.T) {
	vm := startFake(t, behaviour{vsock: threadBehaviour})
	vm.Examine()
	i := slices.IndexFunc(vm.processes, func(p *process) bool { return p.Role == roleVsock })
	daemon := vm.processes[i]
	if !slices.Contains(daemon.threads, workerName) {
		t.Fatalf("threads: %v", daemon.threads)
	}
	daemon.threads = []string{workerName} // the others are of Go's runtime, which ends some
	vm.Examine()
	if vm.isDown() {
		t.Fatalf("down with all its threads: %s", vm.state)
	}
	if err := unix.Kill(daemon.PID, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	for ctx := within(t); slices.Contains(threadNames(daemon.PID), workerName); runtime.Gosched() {
		if ctx.Err() != nil {
			t.Fatal("the thread did not end")
		}
	}
	vm.Examine()
	await(t, "end", vm.Done())
	if err := vm.Err(); err == nil || !strings.Contains(err.Error(), "vhost-device-vsock lost its thread "+workerName) {
		t.Errorf("err = %v", err)
	}
}

func TestMissingNames(t *testing.T) {
	for _, tt := range []struct{ was, is, missing []string }{
		{[]string{"a", "b", "b"}, []string{"b", "a", "b", "c"}, nil},
		{[]string{"a", "b", "b"}, []string{"b", "a"}, []string{"b"}},
		{[]string{"a"}, nil, []string{"a"}},
	} {
		if got := missingNames(tt.was, tt.is); !slices.Equal(got, tt.missing) {
			t.Errorf("missingNames(%v, %v) = %v, want %v", tt.was, tt.is, got, tt.missing)
		}
	}
}
