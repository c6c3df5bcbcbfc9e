// Command vmshim-agent is all of vmshim that runs in the guest:
//
//	/init                   the first process (as process 1)
//	vmshim-agent agent      the agent, started by the first process
//	vmshim-agent init       a container's first steps, started by libcontainer
//	modprobe                the kernel's helper, by this name
//	vmshim-agent --version
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/guest/boot"
	"github.com/vmshim/vmshim/internal/guest/module"
	"github.com/vmshim/vmshim/internal/version"
)

func main() { os.Exit(run(os.Args)) }

func run(args []string) int {
	command := ""
	if len(args) > 1 {
		command = args[1]
	}
	switch {
	case filepath.Base(args[0]) == "modprobe":
		return module.Modprobe(args[1:])
	case command == "--version":
		fmt.Println("vmshim-agent", version.Version)
		return 0
	case os.Getpid() == 1:
		boot.Run(logger(context.Background()), "agent")
		return 1
	case command == "agent":
		ctx, stop := signal.NotifyContext(logger(context.Background()), unix.SIGTERM)
		defer stop()
		if err := serve(ctx); err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("agent ends")
			return 1
		}
		return 0
	}
	fmt.Fprintln(os.Stderr, "usage: vmshim-agent agent | init | --version")
	return 2
}

// logger makes log lines that the host can parse.
func logger(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetFormatter(&logrus.JSONFormatter{TimestampFormat: log.RFC3339NanoFixed})
	return log.WithLogger(ctx, logrus.NewEntry(l))
}
