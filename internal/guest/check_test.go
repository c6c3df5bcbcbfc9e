package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestCheckID(t *testing.T) {
	for _, id := range []string{"a", "A-b_c.d+e", strings.Repeat("x", 255)} {
		if err := checkID("id", id); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"", ".", "..", "a/b", "/", "-x", ".x", "a b", "ä", "a\x00", strings.Repeat("x", 256)} {
		if err := checkID("id", id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want invalid argument", id, err)
		}
	}
}

func TestBelow(t *testing.T) {
	tests := []struct{ path, want string }{
		{"/root/a", "a"},
		{"/root/a/b/", "a/b"},
		{"/root/..a", "..a"},
		{"/root", ""},
		{"/root/", ""},
		{"/root/../etc", ""},
		{"/rooted", ""},
		{"/etc", ""},
		{"root/a", ""},
		{"/root/a\x00", ""},
		{"", ""},
		{"/root/" + strings.Repeat("x/", 4000), ""},
	}
	for _, test := range tests {
		got, err := below("path", "/root", test.path)
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%.40q: got %q, %v, want %q", test.path, got, err, test.want)
		}
	}
}

func TestToStatus(t *testing.T) {
	tests := []struct {
		err  error
		code codes.Code
	}{
		{notFound("container %q", "x"), codes.NotFound},
		{invalid("id"), codes.InvalidArgument},
		{precondition("state"), codes.FailedPrecondition},
		{notImplemented("call"), codes.Unimplemented},
		{fmt.Errorf("x: %w", errdefs.ErrAlreadyExists), codes.AlreadyExists},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{fmt.Errorf("x: %w", context.Canceled), codes.Canceled},
		{fmt.Errorf("x: %w", errdefs.ErrPermissionDenied), codes.PermissionDenied},
		{os.ErrNotExist, codes.Internal}, // of a file, not of a container
		{errors.New("x"), codes.Internal},
	}
	for _, test := range tests {
		if got := status.Code(toStatus(test.err)); got != test.code {
			t.Errorf("%v: got %v, want %v", test.err, got, test.code)
		}
	}
	long := status.Convert(toStatus(errors.New(strings.Repeat("\xff", 1<<20)))).Message()
	if len(long) > maxErrorText+8 {
		t.Errorf("a text of %d bytes", len(long))
	}
}

func TestParseAddr(t *testing.T) {
	tests := []struct {
		addr string
		port uint32
		path string
	}{
		{"", 1024, ""},
		{"vsock://-1:1024", 1024, ""},
		{"vsock://-1:99", 99, ""},
		{"unix:///run/agent", 0, "/run/agent"},
		{"unix://@agent", 0, "@agent"},
	}
	for _, test := range tests {
		port, path, err := parseAddr(test.addr)
		if err != nil || port != test.port || path != test.path {
			t.Errorf("%q: got %d, %q, %v", test.addr, port, path, err)
		}
	}
	for _, addr := range []string{"tcp://x:1", "vsock://x", "vsock://-1:1028", "vsock://-1:0", "unix://", "%", "vsock://-1:99999999999"} {
		if _, _, err := parseAddr(addr); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want invalid argument", addr, err)
		}
	}
}

func TestLock(t *testing.T) {
	l := newLock()
	if err := l.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.acquire(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
	l.release()
	// A free lock is taken even when there is no time left.
	if err := l.acquire(ctx); err != nil {
		t.Error(err)
	}
	if l.tryAcquire() {
		t.Error("taken twice")
	}
}

func TestPiecewise(t *testing.T) {
	r, w := io.Pipe()
	conn := piecewiseConn{pipeConn{w: w}}
	data := strings.Repeat("x", 3*maxPacket+7)
	go func() {
		if n, err := conn.Write([]byte(data)); n != len(data) || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
		w.Close()
	}()
	var got int
	buf := make([]byte, 2*maxPacket)
	for {
		n, err := r.Read(buf)
		if n > maxPacket {
			t.Errorf("%d bytes at once", n)
		}
		got += n
		if err != nil {
			break
		}
	}
	if got != len(data) {
		t.Errorf("got %d bytes, want %d", got, len(data))
	}
	if n, err := conn.Write(nil); n != 0 || err == nil {
		t.Errorf("write to a closed pipe: %d, %v", n, err)
	}
}
