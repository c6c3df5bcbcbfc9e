// Command demo shows a container in a machine of its own, run through
// containerd's client, step by step. It starts a containerd of its own, ends
// with an error when any step does not show what it should, and leaves nothing.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vmshim/vmshim/test/daemon"
)

// limit bounds the whole demo: a step that hangs is a step that failed.
const limit = 3 * time.Minute

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	if err := demo(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		return 1
	}
	fmt.Printf("\nEverything worked, and nothing is left. %.1f s.\n", time.Since(began).Seconds())
	return 0
}

func demo(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "vmdemo")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n(logs are in %s)", err, dir)
			return
		}
		err = os.RemoveAll(dir)
	}()
	local, err := daemon.NewLocal(ctx, dir, "debug = true", daemon.TemplateDir("")) // a start is to be seen whole
	if err != nil {
		return err
	}
	if err := local.Built(); err != nil {
		return err
	}

	title("The host")
	if err := show(vmshim(ctx, local, "check")); err != nil {
		return err
	}

	title("A containerd of its own, and an image made of " + "/bin/busybox")
	d, err := local.Start(ctx, "debian")
	if err != nil {
		return err
	}
	fmt.Printf("containerd %s, everything it writes is in %s\n", d.Version, dir)

	s := &scene{Daemon: d, local: local, id: fmt.Sprintf("demo-%d", os.Getpid())}
	err = s.play(ctx)
	return errors.Join(err, s.clear(context.WithoutCancel(ctx)))
}

func title(text string) { fmt.Printf("\n\x1b[1m== %s\x1b[0m\n", text) }

// share is the directory of the host that the container sees as /shared.
func (s *scene) share() string { return filepath.Join(s.local.Dir, "shared") }

// expect fails unless text has every one of the words in it.
func expect(text string, words ...string) error {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return fmt.Errorf("%q is without %q", text, w)
		}
	}
	return nil
}
