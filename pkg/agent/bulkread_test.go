package agent

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
)

// bulkPair is a reader and its other end.
func bulkPair(t *testing.T) (*bulkReader, net.Conn) {
	t.Helper()
	a, b := agenttest.SocketPair(t)
	return &bulkReader{a}, b
}

// A large read takes the packet that comes after the first one was read, if it comes
// soon: on a busy machine not at the first try.
func TestBulkReader(t *testing.T) {
	r, w := bulkPair(t)
	const packet = bulkRead
	for range 100 {
		data := bytes.Repeat([]byte("0123456789abcdef"), 2*packet/16)
		if _, err := w.Write(data[:packet]); err != nil {
			t.Fatal(err)
		}
		var writer sync.WaitGroup
		writer.Go(func() {
			for unread(t, r) > 0 {
				runtime.Gosched()
			}
			if _, err := w.Write(data[packet:]); err != nil {
				t.Error(err)
			}
		})
		got := make([]byte, len(data))
		n, err := r.Read(got)
		if err == nil {
			_, err = io.ReadFull(r, got[n:])
		}
		writer.Wait()
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes of %d at first, %v, not what was written", n, len(data), err)
		}
		if n == len(data) {
			return
		}
	}
	t.Error("no read waited for the second packet")
}

// unread is how many bytes have come.
func unread(t *testing.T, r *bulkReader) (n int) {
	raw, err := r.Conn.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Error(err)
		return 0
	}
	closed := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	if closed != nil || err != nil {
		t.Error(closed, err)
	}
	return n
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
	r, w := bulkPair(t)
	if _, err := r.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}
	w.Close() // with what it has not read
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
