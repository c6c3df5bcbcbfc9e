package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// One thread has the monitor's slack then, and it is not the main one.
func TestCalmMonitor(t *testing.T) {
	if err := calmMonitor(); err != nil {
		t.Fatal(err)
	}
	threads, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	calm := 0
	for _, thread := range threads {
		id := filepath.Base(thread)
		slack, err := os.ReadFile("/proc/" + id + "/timerslack_ns")
		if err == nil && strings.TrimSpace(string(slack)) == "2000000" {
			calm++
		}
	}
	if calm != 1 {
		t.Errorf("%d of %d threads are calm, want the monitor alone", calm, len(threads))
	}
}
