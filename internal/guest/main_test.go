package guest

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestMain fails when tests leave goroutines or files behind.
func TestMain(m *testing.M) {
	files := openFiles()
	code := m.Run()
	if code == 0 {
		if left := leftGoroutines(); left != "" {
			fmt.Println("goroutines left:\n" + left)
			code = 1
		}
		if now := openFiles(); now > files+1 { // the poller's own
			fmt.Printf("%d files open, %d before\n", now, files)
			code = 1
		}
	}
	os.Exit(code)
}

func leftGoroutines() (left string) {
	for range 100 {
		buf := make([]byte, 1<<20)
		left = ""
		for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if strings.Contains(g, "internal/guest.") && !strings.Contains(g, "TestMain") {
				left += g + "\n\n"
			}
		}
		if left == "" {
			return ""
		}
		time.Sleep(20 * time.Millisecond)
	}
	return left
}

func openFiles() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}
