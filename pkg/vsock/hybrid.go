package vsock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

const (
	// maxSunPath is what sockaddr_un holds with its terminating zero.
	maxSunPath = 107
	// maxReply is the length of "OK 4294967295\n".
	maxReply = 14
)

// maxAbandoned bounds the attempts without an answer that are held at a time.
const maxAbandoned = 64

// Hybrid dials through the unix socket at path. Where nobody listens in the
// guest the device closes the connection (the error is ECONNREFUSED) or leaves
// it hanging until the context ends.
func Hybrid(path string) Dialer {
	h := &hybrid{path: path}
	return func(ctx context.Context, port uint32) (net.Conn, error) {
		conn, err := h.dial(ctx, port)
		if err != nil {
			return nil, fmt.Errorf("dial guest port %d: %w", port, err)
		}
		return conn, nil
	}
}

// A hybrid holds what was dialed in vain. vhost-device-vsock (0.3) ends the thread
// that serves the guest, and all connections with it, when the guest answers to one
// that the host has closed. So it is closed when it has an answer, or ends with the
// device; or when it is the oldest of too many, which has no answer to come.
type hybrid struct {
	path string

	mu        sync.Mutex
	abandoned []*attempt // guarded by mu
}

// An attempt is a connection whose handshake a goroutine waits for, which ends
// with the device at the latest.
type attempt struct {
	net.Conn
	ended chan struct{} // closed when err is set
	err   error
}

func (h *hybrid) dial(ctx context.Context, port uint32) (net.Conn, error) {
	if len(h.path) > maxSunPath {
		return nil, fmt.Errorf("socket path %q: %w", h.path, syscall.ENAMETOOLONG)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", h.path)
	if err != nil {
		return nil, err
	}
	a := &attempt{Conn: conn, ended: make(chan struct{})}
	go h.await(a, port)
	select {
	case <-a.ended:
	case <-ctx.Done():
		h.abandon(a)
		return nil, context.Cause(ctx)
	}
	if a.err != nil {
		_ = conn.Close()
		return nil, a.err
	}
	return conn, nil
}

// await waits for the device's answer, which is for nobody any more when the
// attempt was abandoned.
func (h *hybrid) await(a *attempt, port uint32) {
	err := handshake(a, port)
	h.mu.Lock()
	defer h.mu.Unlock()
	a.err = err
	close(a.ended)
	if i := slices.Index(h.abandoned, a); i >= 0 {
		h.abandoned = slices.Delete(h.abandoned, i, i+1)
		_ = a.Close()
	}
}

// abandon leaves the attempt to await.
func (h *hybrid) abandon(a *attempt) {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-a.ended:
		_ = a.Close()
		return
	default:
	}
	if len(h.abandoned) == maxAbandoned {
		_ = h.abandoned[0].Close()
		h.abandoned = slices.Delete(h.abandoned, 0, 1)
	}
	h.abandoned = append(h.abandoned, a)
}

func handshake(conn io.ReadWriter, port uint32) error {
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return fmt.Errorf("write connect: %w", err)
	}
	line, err := readLine(conn)
	if errors.Is(err, io.EOF) && line == "" {
		return fmt.Errorf("closed by the device: %w", syscall.ECONNREFUSED)
	}
	if err != nil {
		return fmt.Errorf("read reply after %q: %w", line, err)
	}
	return parseReply(line)
}

// readLine reads byte by byte: what follows the line belongs to the caller.
func readLine(r io.Reader) (string, error) {
	line := make([]byte, 0, maxReply)
	for len(line) < maxReply {
		var b [1]byte
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return string(line), err
		}
		line = append(line, b[0])
		if b[0] == '\n' {
			return string(line), nil
		}
	}
	return string(line), errors.New("reply is too long")
}

// parseReply accepts "OK <number>\n" and nothing else. The number is the
// host's side of the stream; nobody needs it.
func parseReply(line string) error {
	number, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "OK ")
	if !ok {
		return fmt.Errorf("reply %q is not OK", line)
	}
	if _, err := strconv.ParseUint(number, 10, 32); err != nil {
		return fmt.Errorf("reply %q: %w", line, err)
	}
	return nil
}
