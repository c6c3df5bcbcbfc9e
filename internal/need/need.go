// Package need is how a test says what it lacks: it skips, or fails where nothing
// may be missing (VMSHIM_REQUIRE=1, as in CI).
package need

import (
	"os"
	"testing"
)

// Missing ends a test that cannot run here. What it says is how it could.
func Missing(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("VMSHIM_REQUIRE") == "1" {
		tb.Fatalf("required: "+format, args...)
	}
	tb.Skipf(format, args...)
}

// Root ends a test that is not run as root.
func Root(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		Missing(tb, "needs root: run as root")
	}
}
