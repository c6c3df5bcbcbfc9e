package cli

import (
	"context"
	"errors"
)

func console(_ context.Context, c *call) error {
	if _, err := c.one(); err != nil {
		return err
	}
	return errors.New("not yet")
}
