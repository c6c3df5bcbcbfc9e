package qemu

import (
	"bytes"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"
)

// A ring keeps the last bytes written to it.
type ring struct {
	mu   sync.Mutex
	data []byte // guarded by mu; the newest at the end, at most max of them kept
	max  int
}

func newRing(size int) *ring { return &ring{max: size} }

func (r *ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.data = append(r.data, p...)
	if len(r.data) > 2*r.max { // moved seldom, not at every write
		r.data = append(r.data[:0], r.data[len(r.data)-r.max:]...)
	}
	return len(p), nil
}

func (r *ring) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.data[max(0, len(r.data)-r.max):])
}

// tail gives the last lines of a text, each made safe to print and cut to a
// length that a log bears. Empty lines are left out.
func tail(text string, lines int) []string {
	var last []string
	for text != "" && len(last) < lines {
		i := strings.LastIndexByte(text, '\n')
		if line := printable(text[i+1:]); line != "" {
			last = append(last, line)
		}
		text = text[:max(0, i)]
	}
	for i, j := 0, len(last)-1; i < j; i, j = i+1, j-1 {
		last[i], last[j] = last[j], last[i]
	}
	return last
}

// maxLine is what is shown of one line.
const maxLine = 512

// printable escapes what could play tricks on a terminal or a log.
func printable(line string) string {
	line = strings.TrimRight(line, "\r\n\t ")
	if len(line) > maxLine {
		line = line[:maxLine] + "…"
	}
	plain := strings.IndexFunc(line, func(r rune) bool {
		return r == utf8.RuneError || r == '\\' || !strconv.IsPrint(r)
	}) < 0
	if plain {
		return line
	}
	quoted := strconv.Quote(line)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}

// A lineSplitter calls emit for every line written to it, or for a part of one
// that grows too long.
type lineSplitter struct {
	emit func(string)
	part []byte
}

func (s *lineSplitter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		line, rest, found := bytes.Cut(p, []byte("\n"))
		s.part = append(s.part, line[:min(len(line), maxLine+1-min(len(s.part), maxLine+1))]...)
		if found {
			s.flush()
		}
		p = rest
	}
	return n, nil
}

// flush emits what came without an end.
func (s *lineSplitter) flush() {
	if line := printable(string(s.part)); line != "" {
		s.emit(line)
	}
	s.part = s.part[:0]
}
