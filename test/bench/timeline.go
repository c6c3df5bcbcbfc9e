package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

// A step is a phase of a start.
type step struct {
	Name         string  `json:"name"`
	Milliseconds float64 `json:"ms"` // since the first one
}

// length is the time from the beginning of the shim's work to the first output;
// 0 when that has not come.
func length(line []sandbox.Phase) time.Duration {
	at := map[string]time.Time{}
	for _, p := range line {
		at[p.Name] = p.At
	}
	if at[sandbox.PhaseOutput].IsZero() {
		return 0
	}
	return at[sandbox.PhaseOutput].Sub(at[sandbox.PhaseShim])
}

// steps puts a time line in order.
func steps(line []sandbox.Phase) (list []step) {
	line = slices.Clone(line)
	slices.SortStableFunc(line, func(a, b sandbox.Phase) int { return a.At.Compare(b.At) })
	for _, p := range line {
		list = append(list, step{p.Name, float64(p.At.Sub(line[0].At).Microseconds()) / 1000})
	}
	return list
}

// draw shows each step as a bar from the one before, in a picture of text.
func draw(w io.Writer, line []step) {
	const width = 60
	if len(line) == 0 {
		return
	}
	total := line[len(line)-1].Milliseconds
	fmt.Fprintf(w, "\nthe start that took as long as most, in ms:\n")
	last := 0
	for i, s := range line {
		to := int(s.Milliseconds / total * width)
		bar := ""
		if i > 0 {
			bar = strings.Repeat(" ", last) + strings.Repeat("█", max(1, to-last))
		}
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%8.0f  %-10s  %s", s.Milliseconds, s.Name, bar), " "))
		last = to
	}
}
