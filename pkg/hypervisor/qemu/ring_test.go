package qemu

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

func TestRingKeepsTheEnd(t *testing.T) {
	r := newRing(10)
	var all []byte
	for i := range 100 {
		part := bytes.Repeat([]byte{byte('a' + i%26)}, i%7)
		_, _ = r.Write(part)
		all = append(all, part...)
		if want := string(all[max(0, len(all)-10):]); r.String() != want {
			t.Fatalf("after %d: %q, want %q", i, r, want)
		}
	}
	_, _ = r.Write(bytes.Repeat([]byte("x"), 1000))
	if len(r.data) > 20 {
		t.Errorf("holds %d bytes", len(r.data))
	}
}

func TestTail(t *testing.T) {
	tests := []struct {
		name, text string
		n          int
		want       []string
	}{
		{"empty", "", 3, nil},
		{"last of many", "a\nb\nc\nd\n", 2, []string{"c", "d"}},
		{"no end", "a\nb", 2, []string{"a", "b"}},
		{"blank lines do not count", "a\r\n\r\n \n\nb\n", 2, []string{"a", "b"}},
		{"tricks are shown", "\x1b[31mred\x00 \"q\" \\ \u202e\xff", 1, []string{`\x1b[31mred\x00 "q" \\ \u202e\xff`}},
		{"text of any language", "größe 大", 1, []string{"größe 大"}},
		{"long", strings.Repeat("x", 600), 1, []string{strings.Repeat("x", 512) + "…"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tail(tt.text, tt.n); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestLineSplitter(t *testing.T) {
	var got []string
	s := lineSplitter{emit: func(l string) { got = append(got, l) }}
	for _, part := range []string{"a", "b\nc\n\n", "", strings.Repeat("y", 5000), "z\nend"} {
		_, _ = io.WriteString(&s, part)
	}
	if cap(s.part) > 4096 {
		t.Errorf("holds %d bytes of one line", cap(s.part))
	}
	s.flush()
	want := []string{"ab", "c", strings.Repeat("y", 512) + "…", "end"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// FuzzLines: nothing that a guest prints gets through as a control character.
func FuzzLines(f *testing.F) {
	f.Add([]byte("a\r\nb\x1b[0m\n"), uint8(3))
	f.Add([]byte{0xff, '\n', 0xe2, 0x80}, uint8(1))
	f.Add(bytes.Repeat([]byte("long "), 1000), uint8(200))
	f.Fuzz(func(t *testing.T, text []byte, chunk uint8) {
		check := func(line string) {
			if len(line) > 8*maxLine || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Errorf("line %q", line)
			}
		}
		s := lineSplitter{emit: check}
		for part := range slices.Chunk(text, int(chunk)+1) {
			_, _ = s.Write(part)
		}
		s.flush()
		for _, line := range tail(string(text), 10) {
			check(line)
		}
	})
}

// What a guest prints goes to the debug log, but never without a bound.
func TestConsole(t *testing.T) {
	var out bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&out)
	logger.SetLevel(logrus.DebugLevel)
	c, far, err := newConsole(log.L.WithField("id", "x").WithFields(nil))
	if err != nil {
		t.Fatal(err)
	}
	far.Close()
	c.close() // ends without a word

	c, far, err = newConsole(&log.Entry{Logger: logger, Data: log.Fields{}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 * consoleLines {
		fmt.Fprintf(far, "line %d\r\n", i)
	}
	far.Close()
	c.close()
	if n := strings.Count(out.String(), "guest console"); n < consoleLines || n > 5*consoleLines {
		t.Errorf("%d lines logged of %d", n, 10*consoleLines)
	}
	if want := fmt.Sprintf("line %d", 10*consoleLines-1); !slices.Equal(tail(c.ring.String(), 1), []string{want}) {
		t.Errorf("tail %q, want %s", tail(c.ring.String(), 1), want)
	}
}
