package shim

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/vmtest"
)

// roomFor says whether so many bytes can be written where the bundles are.
func roomFor(bytes uint64) bool {
	var fs unix.Statfs_t
	return unix.Statfs(os.TempDir(), &fs) == nil && fs.Bavail*uint64(fs.Bsize) > bytes
}

func TestMain(m *testing.M) {
	// Not on a KVM host of the tests, whose files are in its memory.
	if os.Getenv("VMSHIM_TEST_ALL") != "" && roomFor(4<<30) {
		moveMore()
	}
	vmtest.Main(m)
}
