package boot

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestConsoleWrites(t *testing.T) {
	var got bytes.Buffer
	c := newConsole(&got)
	for _, s := range []string{"one\n", "two\n", "three\n"} {
		if n, err := c.Write([]byte(s)); n != len(s) || err != nil {
			t.Errorf("Write = %d, %v", n, err)
		}
	}
	c.Flush(time.Minute)
	if want := "one\ntwo\nthree\n"; got.String() != want {
		t.Errorf("console got %q, want %q", got.String(), want)
	}
}

// stuck is a serial port that nobody reads.
type stuck struct {
	first chan []byte
	never chan struct{}
}

func (s stuck) Write(p []byte) (int, error) {
	s.first <- p
	<-s.never
	return len(p), nil
}

func TestConsoleStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := stuck{first: make(chan []byte), never: make(chan struct{})}
		c := newConsole(s)
		_, _ = c.Write([]byte("begin"))
		<-s.first
		line := []byte(strings.Repeat("x", 1023) + "\n")
		for range 1000 {
			_, _ = c.Write(line) // must not block
		}
		_, _ = c.Write([]byte("the last words"))
		begin := time.Now()
		c.Flush(time.Second)
		if d := time.Since(begin); d != time.Second {
			t.Errorf("Flush took %v, want 1s", d)
		}
		p, _ := c.take()
		if len(p) != consoleBytes || !bytes.HasSuffix(p, []byte("the last words")) {
			t.Errorf("%d bytes wait, want the last %d", len(p), consoleBytes)
		}
		_, _ = c.Write([]byte("."))
		close(s.never)
		<-s.first
		synctest.Wait()
	})
}
