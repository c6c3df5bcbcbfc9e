package guest

import (
	"testing"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

func TestLowWater(t *testing.T) {
	for release, want := range map[string]int{
		"6.12.94+deb13-cloud-amd64": extension.MaxChunk, "6.8": extension.MaxChunk, "7.0.1": extension.MaxChunk,
		"6.7.12": 60 << 10, "6.1.0-57-cloud-amd64": 60 << 10, "5.15": 60 << 10, "": 60 << 10,
	} {
		if got := lowWaterOf(release); got != want {
			t.Errorf("%q: %d, want %d", release, got, want)
		}
	}
}
