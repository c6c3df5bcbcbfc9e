package qemu

import (
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
)

// An ExitError says why a machine is gone. Its class is ErrUnavailable. With
// %+v it is all that is known, on many lines.
type ExitError struct {
	Name  string // of the machine
	State string // what happened: "qemu: signal: killed", "guest reset", …
	Ready bool   // the guest's agent had served
	// Console and Output are the ends of the guest's console and of what QEMU
	// and its helpers said, safe to print.
	Console []string
	Output  []string
	Cmdline []string // QEMU's
}

// shown is how many lines of each kind go into the one line.
const shown = 3

func (e *ExitError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "machine %q ended", e.Name)
	if !e.Ready {
		b.WriteString(" before its agent was ready")
	}
	fmt.Fprintf(&b, ": %s", e.State)
	show := func(what string, lines []string) {
		if len(lines) > 0 {
			fmt.Fprintf(&b, "; %s: %s", what, strings.Join(lines[max(0, len(lines)-shown):], " | "))
		}
	}
	show("output", e.Output)
	if words := lastWords(e.Console); len(words) > 0 {
		show("console", words) // without the trace, which is of no use in one line
	} else {
		show("console", e.Console)
	}
	return b.String()
}

// lastWords are those of a kernel that panicked: what it stumbled over and where, if
// it did, and why it ended (die_header and show_ip in arch/x86/kernel/dumpstack.c,
// __die and show_regs in arch/arm64/kernel, panic in kernel/panic.c).
func lastWords(console []string) (words []string) {
	for _, line := range console {
		switch {
		case strings.Contains(line, "Kernel panic - not syncing"):
			return append(words, line)
		case len(words) == 0 && strings.Contains(line, "[#1]"),
			len(words) == 1 && (strings.Contains(line, "RIP: ") || strings.Contains(line, "pc : ")):
			words = append(words, line)
		}
	}
	return nil
}

// Unwrap gives the class.
func (e *ExitError) Unwrap() error { return errdefs.ErrUnavailable }

// Format implements fmt.Formatter.
func (e *ExitError) Format(s fmt.State, verb rune) {
	switch {
	case verb == 'v' && s.Flag('+'):
		e.all(s)
	case verb == 'q':
		fmt.Fprintf(s, "%q", e.Error())
	default:
		_, _ = io.WriteString(s, e.Error())
	}
}

func (e *ExitError) all(w io.Writer) {
	fmt.Fprintf(w, "machine %q ended: %s (agent ready: %t)\n", e.Name, e.State, e.Ready)
	for _, part := range []struct {
		what  string
		lines []string
	}{{"output", e.Output}, {"console", e.Console}, {"command line", e.Cmdline}} {
		fmt.Fprintf(w, "%s:\n", part.what)
		for _, line := range part.lines {
			fmt.Fprintf(w, "\t%s\n", line)
		}
	}
}
