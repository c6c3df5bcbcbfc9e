// Package shim is what containerd talks to: the start, delete and -info
// commands in every dialect of the daemon, the task service in versions 2 and
// 3, events, and the copying of standard streams.
//
// The life of a shim:
//
//   - containerd runs "start". It makes the socket, starts the daemon (the same
//     binary, see daemon.go), waits until it serves, prints the address, ends.
//   - The first Create starts the sandbox. Every container of the pod is then
//     created in the same daemon.
//   - Each process has one goroutine that follows it to its end (process.go) and
//     up to three that copy its streams (io.go). The service joins all of them.
//   - The Delete of the last container stops the sandbox, Shutdown ends the daemon.
//   - containerd runs "delete" after every Delete, and instead of it when the
//     daemon is gone: it must clean up, or see that there is nothing to do.
package shim

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// Name is the runtime's, as containerd spells it.
const Name = "io.containerd.vm.v2"

// Options are what the wiring gives.
type Options struct {
	// Version is the project's.
	Version string
	// Sandbox returns the options of a sandbox with this configuration that the
	// shim cannot know, above all StartVM.
	Sandbox func(cfg config.Config) sandbox.Options
}

// Main runs the command that args (without the program's name) ask for and
// returns the exit code. What goes to stdout is read by containerd.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, opts Options) int {
	if err := run(ctx, args, stdin, stdout, opts); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", Name, err)
		return 1
	}
	return 0
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer, opts Options) error {
	c, err := parseCommand(args)
	if err != nil {
		return err
	}
	switch c.action {
	case actionVersion:
		_, err := fmt.Fprintf(stdout, "%s:\n  Version:  %s\n", Name, opts.Version)
		return err
	case actionInfo:
		return c.info(stdin, stdout, opts.Version)
	case actionStart:
		return c.start(ctx, stdin, stdout)
	case actionDelete:
		return c.delete(ctx, stdout)
	case actionServe:
		return serve(ctx, c, opts)
	}
	return errors.New("unknown action " + c.action)
}
