// Package cli is the operator's command, vmshim: what the host offers, which
// sandboxes there are, what their guests said. It reads the same configuration
// and the same state files as the shim, and changes nothing.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/vmshim/vmshim/pkg/config"
)

// The exit statuses of Main.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// A command is one word of the command line.
type command struct {
	name, args, help string
	run              func(ctx context.Context, c *call) error
}

func commands() []command {
	return []command{
		{"check", "", "what the shim finds on this host, and what is missing", check},
		{"console", "ID", "the last lines that a sandbox's guest wrote to its console", console},
		{"list", "", "the sandboxes", list},
		{"ps", "ID", "the processes of a container, or of all in a sandbox", ps},
		{"timeline", "ID", "how a sandbox started, step by step", timeline},
		{"version", "", "which vmshim this is", showVersion},
	}
}

// A call is a command with what it was called with.
type call struct {
	command
	operands   []string
	configPath string
	json       bool
	stdout     io.Writer
}

// errFailed says that the command has printed already what is wrong.
var errFailed = errors.New("failed")

// Main runs the command that args (without the program's name) ask for and
// returns the exit status: 0, 1 when it failed, 2 when it was not understood.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		usage(stderr)
		return exitUsage
	}
	if slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
		usage(stdout)
		return exitOK
	}
	i := slices.IndexFunc(commands(), func(c command) bool { return c.name == args[0] })
	if i < 0 {
		fmt.Fprintf(stderr, "vmshim: no command %q\n", args[0])
		usage(stderr)
		return exitUsage
	}
	c, err := parse(commands()[i], args[1:], stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if err != nil {
		return exitUsage
	}
	c.stdout = stdout
	switch err := c.run(ctx, c); {
	case errors.Is(err, errFailed):
		return exitFailed
	case err != nil:
		fmt.Fprintf(stderr, "vmshim %s: %v\n", c.name, err)
		return exitFailed
	}
	return exitOK
}

func usage(w io.Writer) {
	fmt.Fprint(w, "usage: vmshim COMMAND [--json] [--config FILE] [ID]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-12s %s\n", strings.TrimSpace(c.name+" "+c.args), c.help)
	}
	fmt.Fprint(w, "\nID is that of a container or sandbox, or the name of a sandbox's directory.\n")
}

// parse reads flags before and after the operands. The flag package prints
// what is wrong.
func parse(cmd command, args []string, stderr io.Writer) (*call, error) {
	c := &call{command: cmd}
	fs := flag.NewFlagSet("vmshim "+cmd.name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintf(stderr, "usage: vmshim %s\n\n%s\n\n", strings.TrimSpace(cmd.name+" [--json] [--config FILE] "+cmd.args), cmd.help)
		fs.PrintDefaults()
	}
	fs.BoolVar(&c.json, "json", false, "print JSON, for programs")
	fs.StringVar(&c.configPath, "config", "", "configuration `file`; default: $"+config.Env+", then "+config.Path)
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		if fs.NArg() == 0 {
			break
		}
		c.operands = append(c.operands, fs.Arg(0))
		args = fs.Args()[1:]
	}
	if want := len(strings.Fields(cmd.args)); len(c.operands) != want {
		err := fmt.Errorf("vmshim %s: %d arguments, want %d", cmd.name, len(c.operands), want)
		fmt.Fprintln(stderr, err)
		fs.Usage()
		return nil, err
	}
	return c, nil
}
