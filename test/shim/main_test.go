package shim

import (
	"testing"

	"github.com/vmshim/vmshim/internal/vmtest"
)

func TestMain(m *testing.M) { vmtest.Main(m) }
