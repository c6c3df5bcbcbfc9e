package vsock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// maxSunPath is what sockaddr_un holds with its terminating zero.
	maxSunPath = 107
	// maxReply is the length of "OK 4294967295\n".
	maxReply = 14
)

// Hybrid dials through the unix socket at path. Where nobody listens in the
// guest the device closes the connection (the error is ECONNREFUSED) or leaves
// it hanging until the context ends.
func Hybrid(path string) Dialer {
	return func(ctx context.Context, port uint32) (net.Conn, error) {
		conn, err := dialHybrid(ctx, path, port)
		if err != nil {
			return nil, fmt.Errorf("dial guest port %d: %w", port, err)
		}
		return conn, nil
	}
}

func dialHybrid(ctx context.Context, path string, port uint32) (_ net.Conn, err error) {
	if len(path) > maxSunPath {
		return nil, fmt.Errorf("socket path %q: %w", path, syscall.ENAMETOOLONG)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	// A deadline in the past ends the handshake wherever it hangs.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = handshake(conn, port)
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	return conn, nil
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
