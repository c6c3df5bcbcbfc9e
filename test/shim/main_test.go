package shim

import (
	"os"
	"testing"

	"github.com/vmshim/vmshim/internal/vmtest"
)

func TestMain(m *testing.M) {
	if os.Getenv("VMSHIM_TEST_ALL") != "" {
		moveMore()
	}
	vmtest.Main(m)
}
