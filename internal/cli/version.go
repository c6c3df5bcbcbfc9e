package cli

import (
	"context"
	"runtime"

	"github.com/vmshim/vmshim/internal/version"
)

func showVersion(_ context.Context, c *call) error {
	v := struct {
		Version string `json:"version"`
		Go      string `json:"go"`
	}{version.Version, runtime.Version()}
	return c.print(v, [][]string{{"vmshim " + v.Version + " (" + v.Go + ")"}})
}
