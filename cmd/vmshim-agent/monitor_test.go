package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vmshim/vmshim/internal/thread"
)

// The monitor has its slack then, as has a thread that the monitor itself starts:
// it is inherited. The main one has not.
func TestCalmMonitor(t *testing.T) {
	if err := calmMonitor(); err != nil {
		t.Fatal(err)
	}
	threads, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	calm := 0
	for _, path := range threads {
		id := filepath.Base(path)
		slack, err := os.ReadFile("/proc/" + id + "/timerslack_ns")
		if err == nil && strings.TrimSpace(string(slack)) == strconv.FormatInt(int64(thread.CalmMonitor), 10) {
			calm++
			if id == strconv.Itoa(os.Getpid()) {
				t.Error("the main thread is calm")
			}
		}
	}
	if calm == 0 {
		t.Errorf("none of %d threads is calm", len(threads))
	}
}
