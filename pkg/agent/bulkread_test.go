package agent

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// bulkPair is a reader and its other end.
func bulkPair(t *testing.T) (*bulkReader, net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
	}
	return &bulkReader{ends[0]}, ends[1]
}

// A large read takes all of the packets that come one by one.
func TestBulkReader(t *testing.T) {
	r, w := bulkPair(t)
	data := bytes.Repeat([]byte("0123456789abcdef"), 8<<10)
	go func() {
		for piece := range slices.Chunk(data, len(data)/bulkLingers) {
			_, _ = w.Write(piece)
		}
	}()
	got := make([]byte, len(data))
	n, err := io.ReadFull(r, got)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d, %v", n, len(data), err)
	}
}

// What has come is there when nothing follows, and the end after it.
func TestBulkReaderPart(t *testing.T) {
	r, w := bulkPair(t)
	if _, err := w.Write([]byte("part")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2*bulkRead)
	if n, err := r.Read(b); string(b[:n]) != "part" || err != nil {
		t.Errorf("read %q, %v", b[:n], err)
	}
	if _, err := w.Write([]byte("last")); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if got, err := io.ReadAll(struct{ io.Reader }{r}); string(got) != "last" || err != nil {
		t.Errorf("read %q to the end, %v", got, err)
	}
	if n, err := r.Read(b); n != 0 || err != io.EOF { //nolint:errorlint // readers compare
		t.Errorf("read %d bytes behind the end, %v", n, err)
	}
}

// A wait for the first byte ends by the deadline, and with the connection.
func TestBulkReaderWait(t *testing.T) {
	r, _ := bulkPair(t)
	if err := r.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, bulkRead)
	if n, err := r.Read(b); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if err := r.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := r.Read(b)
		ended <- err
	}()
	r.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// A connection that is reset says so, to large reads as to small ones.
func TestBulkReaderReset(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	other.Close()
	r := &bulkReader{conn}
	if n, err := r.Read(make([]byte, bulkRead)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// What is small waits for nothing more.
func TestBulkReaderSmall(t *testing.T) {
	r, w := bulkPair(t)
	if _, err := w.Write([]byte("small")); err != nil {
		t.Fatal(err)
	}
	small := bufio.NewReaderSize(r, smallRead)
	b := make([]byte, 1)
	if _, err := small.Read(b); err != nil || small.Buffered() != len("small")-1 {
		t.Errorf("%d bytes beside the first, %v", small.Buffered(), err)
	}
}
