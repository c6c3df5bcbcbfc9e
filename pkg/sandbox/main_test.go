package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// innerEnv marks the run of the tests in a mount namespace of their own.
const innerEnv = "VMSHIM_TEST_INNER"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "anchor":
			os.Exit(AnchorMain(os.Args[2:]))
		case "shim":
			os.Exit(shimMain(os.Args[2:]))
		}
	}
	if os.Getuid() == 0 && os.Getenv(innerEnv) == "" {
		os.Exit(runInner())
	}
	before := inventory{fds(), mounts()}
	code := m.Run()
	if code == 0 {
		if err := leaks(before); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// runInner runs this program again where its mounts disturb nobody.
func runInner() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), innerEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig means the thread
	var exit *exec.ExitError
	switch err := cmd.Run(); {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return max(1, exit.ExitCode())
	default:
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
}

// An inventory is what there was before the tests.
type inventory struct{ files, mounts []string }

// mounts are those of tests. Of other programs' tests there may be some: they
// were copied with the namespace.
func mounts() []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	var list []string
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, os.TempDir()+"/Test") {
			list = append(list, line)
		}
	}
	return list
}

func fds() []string {
	entries, _ := os.ReadDir("/proc/self/fd")
	var list []string
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			list = append(list, to)
		}
	}
	return list
}

// leaks reports what the tests left: goroutines, files, children, mounts.
func leaks(before inventory) error {
	var err error
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err = leaked(before); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

func leaked(before inventory) error {
	if n := runtime.NumGoroutine(); n > 2 { // this one, and os/signal's
		buf := make([]byte, 1<<20)
		return fmt.Errorf("%d goroutines left:\n%s", n, buf[:runtime.Stack(buf, true)])
	}
	if now := fds(); len(now) > len(before.files)+2 { // the poller's
		return fmt.Errorf("files left: %v, before: %v", now, before.files)
	}
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, task := range tasks {
		if b, err := os.ReadFile(task); err == nil && len(b) > 0 {
			return fmt.Errorf("children left: %s", b)
		}
	}
	for _, m := range mounts() {
		if !slices.Contains(before.mounts, m) {
			return fmt.Errorf("mount left: %s", m)
		}
	}
	return nil
}
