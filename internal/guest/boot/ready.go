package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/vmshim/vmshim/pkg/vsock"
)

// Ready says where the host waits for this guest's agent, and what to say
// there. The zero value means that it does not wait.
type Ready struct {
	Port  uint32
	Token string
}

const (
	maxToken     = 256 // kernel command lines have 2048 bytes in all
	readyTimeout = 10 * time.Second
)

func parseReady(value string) (Ready, error) {
	port, token, ok := strings.Cut(value, ":")
	if !ok || token == "" || len(token) > maxToken || strings.ContainsAny(token, " \t\r\n") {
		return Ready{}, errors.New("not PORT:TOKEN")
	}
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil || n == 0 {
		return Ready{}, errors.New("not PORT:TOKEN")
	}
	return Ready{Port: uint32(n), Token: token}, nil
}

// Push tells the host that the agent listens. The host may just as well find
// out by dialing, so that an error here is not fatal.
func (r Ready) Push(ctx context.Context) error {
	if r.Token == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	conn, err := vsock.DialHost(ctx, r.Port)
	if err != nil {
		return fmt.Errorf("say ready: %w", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline) // a bound, not a promise
	}
	if _, err := io.WriteString(conn, r.Token+"\n"); err != nil {
		return fmt.Errorf("say ready to port %d: %w", r.Port, err)
	}
	return nil
}
