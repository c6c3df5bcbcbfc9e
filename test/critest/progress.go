package main

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// A progress reads what critest writes, and tells of each test when it has
// ended.
type progress struct {
	out     io.Writer
	handler string
	base    result // what the first handler did; nil: this is the first
	allowed map[string]string
	total   string // how many tests are to run
	done    int
	last    string // line
	rest    []byte // of the next one
	test    string // the one that runs; empty: none
}

var (
	specs   = regexp.MustCompile(`^Will run (\d+) of \d+ specs$`)
	ended   = regexp.MustCompile(`^[•SP](?: \[([A-Z]+)\])? \[([0-9.]+) seconds\]$`)
	between = strings.Repeat("-", 30)
)

// Write takes pieces of lines, too, and never fails.
func (p *progress) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		line, rest, whole := bytes.Cut(p.rest, []byte("\n"))
		if !whole {
			return len(b), nil
		}
		p.line(string(line))
		p.last, p.rest = string(line), rest
	}
}

func (p *progress) line(line string) {
	if parts := specs.FindStringSubmatch(line); parts != nil {
		p.total = parts[1]
	}
	if name, ok := strings.CutPrefix(line, namePrefix); ok && p.last == between {
		p.test = name
	}
	if parts := ended.FindStringSubmatch(line); parts != nil && p.test != "" {
		p.tell(parts[1], parts[2])
		p.test = ""
	}
}

func (p *progress) tell(outcome, seconds string) {
	outcome = strings.ToLower(outcome)
	if outcome == "" {
		outcome = passed
	}
	note := ""
	if isWorse(p.base[p.test], outcome) {
		note = " (WORSE)"
		if _, excused := p.allowed[p.test]; excused {
			note = " (excused)"
		}
	}
	p.done++
	fmt.Fprintf(p.out, "%-10s %3d of %s %8s s  %-7s  %s%s\n", p.handler, p.done, p.total, seconds, outcome, p.test, note)
}
