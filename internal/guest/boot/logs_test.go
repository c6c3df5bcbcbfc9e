package boot

import (
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestLogServer(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/l")
	if err != nil {
		t.Fatal(err)
	}
	s := newLogServer()
	var jobs sync.WaitGroup
	jobs.Go(func() { s.serve(t.Context(), l) })
	dial := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		return conn
	}
	expect := func(conn net.Conn, want string) {
		t.Helper()
		b := make([]byte, len(want))
		if _, err := io.ReadFull(conn, b); err != nil || string(b) != want {
			t.Errorf("read %q, %v, want %q", b, err, want)
		}
	}
	_, _ = s.Write([]byte("before\n"))
	first, second := dial(), dial()
	expect(first, "before\n")
	expect(second, "before\n")
	_, _ = s.Write([]byte("after\n"))
	expect(first, "after\n")
	expect(second, "after\n")

	// A reader that takes nothing delays nobody.
	stuck := dial()
	readers := func(n int) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			got := len(s.readers)
			s.mu.Unlock()
			if got == n {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%d readers, want %d", got, n)
			}
		}
	}
	readers(3)
	line := strings.Repeat("x", 1023) + "\n"
	jobs.Go(func() { _, _ = io.Copy(io.Discard, second) })
	for range 10000 {
		if _, err := s.Write([]byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	fourth := dial()
	expect(fourth, strings.Repeat(line, consoleBytes/len(line)))
	fifth := dial() // one too many
	if n, err := fifth.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("got %d, %v", n, err)
	}
	for _, c := range []net.Conn{first, second, stuck, fourth, fifth} {
		c.Close()
	}
	readers(0)
	l.Close()
	jobs.Wait()
}

func TestPieces(t *testing.T) {
	var sizes []int
	n, err := pieces{writerFunc(func(b []byte) (int, error) { sizes = append(sizes, len(b)); return len(b), nil })}.Write(make([]byte, maxPacket+1))
	if n != maxPacket+1 || err != nil || len(sizes) != 2 || sizes[0] != maxPacket {
		t.Errorf("got %d, %v in %v", n, err, sizes)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
