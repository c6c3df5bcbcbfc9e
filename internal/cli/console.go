package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

func console(ctx context.Context, c *call) error {
	e, err := c.one()
	if err != nil {
		return err
	}
	text, err := sandbox.ReadConsole(ctx, e.Dir)
	if err != nil {
		return err
	}
	if c.json {
		return c.print(strings.Split(text, "\n"), nil)
	}
	_, err = fmt.Fprintln(c.stdout, text)
	return err
}
