// Command critest runs the unmodified critest of cri-tools on runc and on
// vmshim, and compares: what passes on runc must pass in a machine, with a pause
// container and with the sandbox API, except what docs/limitations.md lists. A
// test that is skipped where it passes on runc is a failure.
//
// Everything runs in network and mount namespaces of its own, on a containerd,
// images and a registry made for it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vmshim/vmshim/pkg/storage"
	"github.com/vmshim/vmshim/test/daemon"
)

type options struct {
	focus, skip, modes, out string
	keep                    bool
}

func main() {
	var o options
	flag.StringVar(&o.focus, "focus", "", "run only tests that match this regular expression")
	flag.StringVar(&o.skip, "skip", "", "leave out tests that match this regular expression")
	flag.StringVar(&o.modes, "modes", "vm,vm-sandbox", "runtime handlers to compare with runc; empty: runc alone")
	flag.StringVar(&o.out, "out", "_output/critest", "where reports and logs go")
	flag.BoolVar(&o.keep, "keep", false, "keep the working directory")
	flag.Parse()
	os.Exit(run(o))
}

func run(o options) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, done, err := daemon.Isolate(ctx)
	if done && err == nil {
		return code
	}
	ok := false
	if err == nil {
		ok, err = compare(ctx, o)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "critest: %v\n", err)
		return 1
	}
	if !ok {
		return 1
	}
	return 0
}

// compare says whether everything is as it should be.
func compare(ctx context.Context, o options) (ok bool, err error) {
	dir, err := os.MkdirTemp("", "vmcri")
	if err != nil {
		return false, err
	}
	if !o.keep {
		defer func() { err = errors.Join(err, remove(dir)) }()
	}
	local, err := daemon.NewLocal(ctx, dir, "debug = true")
	if err != nil {
		return false, err
	}
	if err := local.Built(); err != nil {
		return false, err
	}
	allowed, err := exceptions(filepath.Join(local.Root, "docs/limitations.md"))
	if err != nil {
		return false, err
	}
	if o.out, err = filepath.Abs(o.out); err != nil {
		return false, err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return false, err
	}
	mirror, err := serveImages(ctx, dir)
	if err != nil {
		return false, err
	}
	d, err := local.StartCRI(ctx, "2", daemon.CRI{
		PauseImage: pauseImage, Mirror: mirror, Network: fmt.Sprintf(daemon.Network, filepath.Join(dir, "addresses")),
	})
	if err != nil {
		return false, err
	}
	defer func() {
		_ = os.WriteFile(filepath.Join(o.out, "containerd.log"), []byte(d.Tail(1_000_000)), 0o600)
		err = errors.Join(err, removePods(context.WithoutCancel(ctx), d), d.Stop())
		removeCgroups()
	}()
	handlers := append([]string{daemon.HandlerRunc}, strings.FieldsFunc(o.modes, func(r rune) bool { return r == ',' })...)
	results, took := map[string]result{}, map[string]time.Duration{}
	for _, handler := range handlers {
		began := time.Now()
		report := &progress{out: os.Stdout, handler: handler, base: results[handlers[0]], allowed: allowed}
		if results[handler], err = critest(ctx, local, d, o, handler, report); err != nil {
			return false, fmt.Errorf("on %s: %w", handler, err)
		}
		took[handler] = time.Since(began)
	}
	text, ok := table(results, handlers, allowed, o.focus == "" && o.skip == "")
	text += "\n" + summary(results, handlers, allowed, took)
	fmt.Print("\n" + text)
	return ok, os.WriteFile(filepath.Join(o.out, "table.txt"), []byte(text), 0o600)
}

// remove removes a directory, but nothing through the mounts that failed tests
// leave below it.
func remove(dir string) error {
	if err := storage.Unmount(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// removePods removes those of tests that were interrupted.
func removePods(ctx context.Context, d *daemon.Daemon) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if out, err := d.Crictl(ctx, "rmp", "--all", "--force").CombinedOutput(); err != nil {
		return fmt.Errorf("remove pods: %w: %s", err, out)
	}
	return nil
}

// removeCgroups removes the groups in which CRI puts pods without a parent of
// their own, unless somebody uses them.
func removeCgroups() {
	for _, pattern := range []string{"*/k8s.io", "k8s.io"} {
		dirs, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", pattern)) // the pattern is right
		for _, dir := range dirs {
			_ = os.Remove(dir)
		}
	}
}

// serveImages runs the registry, until the command ends.
func serveImages(ctx context.Context, work string) (url string, err error) {
	all, err := images(ctx, work)
	if err != nil {
		return "", err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{Handler: registry{all}, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(l) }()
	return "http://" + l.Addr().String(), nil
}

// critest runs it on a runtime handler; follow gets what it writes, too.
func critest(
	ctx context.Context, local *daemon.Local, d *daemon.Daemon, o options, handler string, follow io.Writer,
) (result, error) {
	tools, err := local.Hack(ctx, "critest")
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(o.out, handler+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	endpoint, report := "unix://"+d.Address(), filepath.Join(o.out, handler+".xml")
	if err := os.Remove(report); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	args := []string{
		"-runtime-endpoint", endpoint, "-image-endpoint", endpoint, "-runtime-handler", handler,
		"-ginkgo.no-color", "-ginkgo.v", "-ginkgo.timeout", "6h", "-ginkgo.junit-report", report,
	}
	if o.focus != "" {
		args = append(args, "-ginkgo.focus", o.focus)
	}
	if o.skip != "" {
		args = append(args, "-ginkgo.skip", o.skip)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(tools, "critest"), args...)
	both := io.MultiWriter(log, follow)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = both, both, 10*time.Second
	cmd.Dir = local.Dir
	cmd.Env = append(os.Environ(), "TMPDIR="+local.Dir) // where failed tests leave something
	// Failed tests are in the report.
	if err := cmd.Run(); err != nil && (ctx.Err() != nil || cmd.ProcessState == nil) {
		return nil, err
	}
	return readReport(report)
}
