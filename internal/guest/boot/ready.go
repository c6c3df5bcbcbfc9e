package boot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/vsock"
)

// readyTimeout bounds one call to the host.
const readyTimeout = 10 * time.Second

// parseReady reads the only way there is of telling the host that the agent
// serves.
func parseReady(value string) (bool, error) {
	if value != "cid" {
		return false, errors.New("not cid")
	}
	return true, nil
}

// PushReady tells the host that the agent listens, by a connection to the port
// that has the number of this guest's context id. A host that has found out by
// dialing listens no more, and its refusal is as good. For the same reason an error
// is not fatal.
func PushReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	cid, err := vsock.LocalCID()
	if err != nil {
		return fmt.Errorf("say ready: %w", err)
	}
	conn, err := vsock.DialHost(ctx, cid)
	if errors.Is(err, unix.ECONNRESET) { // as vsock refuses
		return nil
	}
	if err != nil {
		return fmt.Errorf("say ready: %w", err)
	}
	return conn.Close()
}
