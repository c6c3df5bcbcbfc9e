package thread

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The first thread is not taken, and no other one outlives its use.
func TestRun(t *testing.T) {
	for range 100 {
		var tid int
		want := errors.New("said")
		if err := Run(func() error { tid = unix.Gettid(); return want }); !errors.Is(err, want) {
			t.Fatalf("err = %v", err)
		}
		if tid == os.Getpid() {
			t.Fatal("on the first thread")
		}
		for end := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid)); errors.Is(err, os.ErrNotExist) {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("thread %d is still there", tid)
			}
		}
	}
}

// What is started meanwhile has the slack; the thread has its own again.
func TestWithTimerSlack(t *testing.T) {
	runtime.LockOSThread() // the same thread before, in it and after
	defer runtime.UnlockOSThread()
	slack := func() (ns string) {
		t.Helper()
		out, err := exec.Command("cat", "/proc/self/timerslack_ns").Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	before := slack()
	want := errors.New("said")
	err := WithTimerSlack(3*time.Millisecond, func() error {
		if got := slack(); got != "3000000" {
			t.Errorf("a child's timers may be %s ns late", got)
		}
		return want
	})
	if !errors.Is(err, want) {
		t.Errorf("err = %v", err)
	}
	if after := slack(); after != before {
		t.Errorf("timers may be %s ns late, %s before", after, before)
	}
}
