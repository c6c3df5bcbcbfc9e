package thread

import (
	"errors"
	"fmt"
	"os"
	"runtime"
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
