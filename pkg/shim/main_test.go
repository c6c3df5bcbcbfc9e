package shim

import (
	"context"
	"fmt"
	"os"
	"runtime/pprof"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// TestMain is also the shim's binary: start runs it again as the daemon, the
// sandbox as the anchor of a container, loggers as themselves.
func TestMain(m *testing.M) {
	switch args := os.Args[1:]; {
	case len(args) > 0 && args[0] == "anchor":
		os.Exit(sandbox.AnchorMain(args[1:]))
	case len(args) > 0 && args[0] == "logger":
		os.Exit(loggerMain(args[2:]))
	case slices.Contains(args, "-namespace") || slices.Contains(args, "-info"):
		os.Exit(Main(context.Background(), args, os.Stdin, os.Stdout, os.Stderr, noMachines()))
	}
	before := descriptors()
	code := m.Run()
	if code == 0 {
		if left := leaked(5 * time.Second); left != "" {
			fmt.Fprintln(os.Stderr, "goroutines left:\n"+left)
			code = 1
		}
		if after := descriptors(); after > before+2 { // the poller's own
			fmt.Fprintf(os.Stderr, "descriptors left: %d, before %d\n", after, before)
			code = 1
		}
	}
	os.Exit(code)
}

// noMachines are options whose machines do not start.
func noMachines() Options {
	return Options{
		Version: "test",
		Sandbox: func(cfg config.Config) sandbox.Options {
			return sandbox.Options{
				Config: cfg.Sandbox,
				StartVM: func(context.Context, hypervisor.Spec, sandbox.VMOptions) (sandbox.Machine, error) {
					return nil, fmt.Errorf("no machine in this test: %w", errdefs.ErrUnavailable)
				},
			}
		},
	}
}

func leaked(patience time.Duration) (left string) {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		var b strings.Builder
		_ = pprof.Lookup("goroutine").WriteTo(&b, 2)
		left = ""
		for g := range strings.SplitSeq(b.String(), "\n\n") {
			if strings.Contains(g, "vmshim/pkg/") && !strings.Contains(g, "TestMain") {
				left += g + "\n\n"
			}
		}
		if left == "" || time.Now().After(deadline) {
			return left
		}
	}
}

func descriptors() int {
	all, _ := os.ReadDir("/proc/self/fd")
	return len(all)
}

// soon fails the test when f takes longer than a few seconds.
func soon(tb testing.TB, what string, f func()) {
	tb.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		var b strings.Builder
		_ = pprof.Lookup("goroutine").WriteTo(&b, 2)
		tb.Fatalf("%s: still blocked after 20 s\n%s", what, b.String())
	}
}
