// Command bench measures what users feel of a container in a machine, each
// against something measured beside it in the same run: a machine that does
// nothing, a raw vsock stream, runc. Absolute times say little, ratios do.
//
// It prints a table, writes JSON with -json, and fails when a number is worse
// than its limit.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/test/daemon"
)

func main() { os.Exit(run()) }

func run() int {
	if len(os.Args) > 1 && os.Args[1] == guestCommand {
		return guestMain(os.Args[2:])
	}
	var (
		jsonPath = flag.String("json", "", "write the results to this `file`")
		runs     = flag.Int("runs", 5, "`times` that each thing is measured; the median counts")
		cycles   = flag.Int("cycles", 200, "`times` that a container is created, started, killed and deleted; execs are five times as many")
		crowded  = flag.Int("sandboxes", 20, "`number` of sandboxes that are started at once")
		making   = flag.String("make-templates", config.Default().QEMU.MakeTemplates, "`when` machines go on from templates in all parts but start, as the setting of that name")
		only     = flag.String("only", "", "comma-separated `parts` to measure: start, template, exec, stdio, memory, pod, network, crowd, execs, cycles")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Hour)
	defer cancel()
	results, err := bench(ctx, *runs, *cycles, *crowded, *making, *only)
	if results != nil { // a part may have failed
		results.print(os.Stdout)
		err = errors.Join(err, results.verdict())
		if *jsonPath != "" {
			err = errors.Join(err, writeJSON(*jsonPath, results))
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		return 1
	}
	return 0
}

// A rig is what everything is measured on.
type rig struct {
	*daemon.Daemon
	local     *daemon.Local
	templates string // the directory for them
	runs      int
	ids       atomic.Int64
	target
}

// A target is what is asked of the numbers that depend on how machines run.
// Zero: nothing.
type target struct {
	boot   float64 // of a bare boot, where each start has one
	start  float64 // of a bare boot, from a template
	exec   float64 // of runc's
	second float64 // container of a pod, of runc's
	host   float64 // memory of a sandbox, MiB
}

var targets = map[string]target{
	qemu.TCG: {start: 1.3, exec: 4, second: 3}, // the first start makes a template, by default
	qemu.KVM: {boot: 1.15, start: 1.15, exec: 1, host: 60},
}

func bench(ctx context.Context, runs, cycles, sandboxes int, making, only string) (_ *results, err error) {
	dir, err := os.MkdirTemp("", "vmbench")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	templates := filepath.Join(dir, "templates")
	wish := qemu.Config{TemplateDir: templates, MakeTemplates: making}
	if err := wish.Validate(); err != nil {
		return nil, err
	}
	local, err := daemon.NewLocal(ctx, dir, daemon.TemplateDir(templates), "make_templates = 'never'",
		"timeouts.start = '1h'", "timeouts.request = '10m'") // many start at once
	if err != nil {
		return nil, err
	}
	if err := local.Built(); err != nil {
		return nil, err
	}
	// Debian's, because its shim for runc speaks the same task API as ours.
	d, err := local.Start(ctx, "debian")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	r := &rig{Daemon: d, local: local, templates: templates, runs: runs}
	defer func() { err = errors.Join(err, r.clear()) }()
	res := &results{Host: r.host(ctx)}
	r.target = targets[res.Host["kind"]]
	if wish.MakesTemplates(qemu.Host{Accelerator: res.Host["kind"]}) {
		if err := local.MakeTemplates(ctx); err != nil {
			return nil, err
		}
	}
	for _, part := range []struct {
		name string
		f    func(context.Context, *results) error
	}{
		{"start", r.withoutTemplates(r.start)},
		{"template", r.startFromTemplate},
		{"exec", r.exec},
		{"stdio", r.stdio},
		{"memory", r.memory},
		{"pod", r.pod},
		{"network", r.network},
		{"crowd", func(ctx context.Context, res *results) error { return r.together(ctx, res, sandboxes) }},
		{"execs", func(ctx context.Context, res *results) error { return r.execs(ctx, res, 5*max(cycles, 4)) }},
		{"cycles", func(ctx context.Context, res *results) error { return r.cycle(ctx, res, cycles) }},
	} {
		if only != "" && !slices.Contains(strings.Split(only, ","), part.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "measuring %s\n", part.name)
		if err := part.f(ctx, res); err != nil {
			return res, fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return res, nil
}

// clear removes the containers that a part which failed, or was interrupted, has
// left.
func (r *rig) clear() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ids, err := r.Ctr(ctx, "container", "list", "--quiet").Output()
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	var errs []error
	for id := range strings.FieldsSeq(string(ids)) {
		_ = r.do(ctx, "task", "delete", "--force", id) // it may have none
		errs = append(errs, r.do(ctx, "container", "delete", id))
	}
	return errors.Join(errs...)
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
