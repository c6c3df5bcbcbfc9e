// Package cli is the operator's command, vmshim: what the host offers, which
// sandboxes there are, what their guests said. It reads the same configuration
// and the same state files as the shim, and changes nothing but templates.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
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
		{"make-templates", "", "boot machines once, for sandboxes without limits to go on from", makeTemplates},
		{"ps", "ID", "the processes of a container, or of all in a sandbox", ps},
		{"templates", "", "the templates that machines go on from instead of booting", templates},
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
	c, err := parse(args, stdout, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	}
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
		fmt.Fprintf(w, "  %-14s %s\n", strings.TrimSpace(c.name+" "+c.args), c.help)
	}
	fmt.Fprint(w, "\nID is that of a container or sandbox, or the name of a sandbox's directory.\n")
}

// find returns flag.ErrHelp after it has printed what was asked for.
func find(name string, stdout, stderr io.Writer) (command, error) {
	if name == "help" {
		usage(stdout)
		return command{}, flag.ErrHelp
	}
	for _, c := range commands() {
		if c.name == name {
			return c, nil
		}
	}
	err := fmt.Errorf("vmshim: no command %q", name)
	fmt.Fprintln(stderr, err)
	usage(stderr)
	return command{}, err
}

// parse reads the command and its operands, with flags anywhere among them. What
// is wrong has been printed.
func parse(args []string, stdout, stderr io.Writer) (*call, error) {
	c := &call{stdout: stdout}
	fs := flag.NewFlagSet("vmshim", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.BoolVar(&c.json, "json", false, "print JSON, for programs")
	fs.StringVar(&c.configPath, "config", "", "configuration `file`; default: $"+config.Env+", then "+config.Path)
	fs.Usage = func() {}
	for {
		err := fs.Parse(args)
		switch {
		case errors.Is(err, flag.ErrHelp):
			c.usage(fs, stdout)
			return nil, err
		case err != nil:
			c.usage(fs, stderr)
			return nil, err
		case fs.NArg() == 0:
			if err := c.check(); err != nil {
				fmt.Fprintln(stderr, err)
				c.usage(fs, stderr)
				return nil, err
			}
			return c, nil
		case c.name != "":
			c.operands = append(c.operands, fs.Arg(0))
		default:
			if c.command, err = find(fs.Arg(0), stdout, stderr); err != nil {
				return nil, err
			}
		}
		args = fs.Args()[1:]
	}
}

// check counts the operands.
func (c *call) check() error {
	if c.name == "" {
		return errors.New("vmshim: no command")
	}
	if want := len(strings.Fields(c.args)); len(c.operands) != want {
		return fmt.Errorf("vmshim %s: %d arguments, want %d", c.name, len(c.operands), want)
	}
	return nil
}

// usage is of the command, if there is one yet.
func (c *call) usage(fs *flag.FlagSet, w io.Writer) {
	if c.name == "" {
		usage(w)
		return
	}
	fmt.Fprintf(w, "usage: vmshim %s\n\n%s\n\n", strings.TrimSpace(c.name+" [--json] [--config FILE] "+c.args), c.help)
	fs.SetOutput(w)
	fs.PrintDefaults()
}
