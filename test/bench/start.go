package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/vmshim/vmshim/internal/guest/boot"
	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/sandbox"
	"github.com/vmshim/vmshim/pkg/storage"
	"github.com/vmshim/vmshim/test/ociimage"
)

const (
	machineRuntime = "io.containerd.vm.v2"
	runcRuntime    = "io.containerd.runc.v2"
)

func (r *rig) host(ctx context.Context) map[string]string {
	h := map[string]string{
		"machine":    fmt.Sprintf("%s, %d CPUs", runtime.GOARCH, runtime.NumCPU()),
		"containerd": "containerd " + r.Version,
	}
	if cfg, err := config.Load(r.local.ShimConfig()); err == nil {
		if host, err := qemu.Probe(ctx, r.qemu(cfg)); err == nil {
			h["accelerator"], h["kind"] = "QEMU "+host.Version+" with "+host.Accelerator, host.Accelerator
		}
	}
	return h
}

// start measures from 'shim start' to the first byte of output, against the
// same machine with a first process that prints a line, and against runc.
// They take turns, so that a busy host disturbs all alike.
func (r *rig) start(ctx context.Context, res *results) error {
	var bare, shim, whole, runc []time.Duration
	lines := map[time.Duration][]sandbox.Phase{}
	for range r.runs {
		t, err := r.bareBoot(ctx)
		if err != nil {
			return fmt.Errorf("bare machine: %w", err)
		}
		bare = append(bare, t)
		line, outer, err := r.firstByte(ctx, machineRuntime)
		if err != nil {
			return fmt.Errorf("container in a machine: %w", err)
		}
		inner := length(line)
		shim, whole, lines[inner] = append(shim, inner), append(whole, outer), line
		if _, outer, err = r.firstByte(ctx, runcRuntime); err != nil {
			return fmt.Errorf("container of runc: %w", err)
		}
		runc = append(runc, outer)
	}
	res.add(result{Name: "bare machine, exec of QEMU to first line", Value: median(bare), Unit: "ms"})
	res.add(result{Name: "shim start to first byte", Value: median(shim), Unit: "ms", Against: "bare machine, exec of QEMU to first line", AtMost: r.boot})
	slices.Sort(shim)
	res.TimeLine = steps(lines[shim[len(shim)/2]])
	res.add(result{Name: "ctr run to first byte, runc", Value: median(runc), Unit: "ms"})
	res.add(result{Name: "ctr run to first byte", Value: median(whole), Unit: "ms", Against: "ctr run to first byte, runc"})
	return nil
}

// withoutTemplates has machines boot while a part is measured.
func (r *rig) withoutTemplates(part func(context.Context, *results) error) func(context.Context, *results) error {
	return func(ctx context.Context, res *results) (err error) {
		aside := r.templates + ".aside"
		if err := os.Rename(r.templates, aside); errors.Is(err, fs.ErrNotExist) {
			return part(ctx, res)
		} else if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.Rename(aside, r.templates)) }()
		return part(ctx, res)
	}
}

// startFromTemplate is start, with machines that go on from a template.
func (r *rig) startFromTemplate(ctx context.Context, res *results) (err error) {
	if _, err := os.Stat(r.templates); errors.Is(err, fs.ErrNotExist) {
		defer func() { err = errors.Join(err, os.RemoveAll(r.templates)) }()
		if err := r.local.MakeTemplates(ctx); err != nil {
			return err
		}
	}
	var bare, shim []time.Duration
	for range r.runs {
		t, err := r.bareBoot(ctx)
		if err != nil {
			return fmt.Errorf("bare machine: %w", err)
		}
		line, _, err := r.firstByte(ctx, machineRuntime)
		if err != nil {
			return fmt.Errorf("container in a machine: %w", err)
		}
		bare, shim = append(bare, t), append(shim, length(line))
	}
	const beside = "bare machine, beside starts from a template"
	res.add(result{Name: beside, Value: median(bare), Unit: "ms"})
	res.add(result{Name: "shim start to first byte, from a template", Value: median(shim), Unit: "ms", Against: beside, AtMost: r.target.start})
	return nil
}

// bareBoot starts the machine that a sandbox gets, with an image whose first
// process prints one line and powers off.
func (r *rig) bareBoot(ctx context.Context) (_ time.Duration, err error) {
	cfg, err := config.Load(r.local.ShimConfig())
	if err != nil {
		return 0, err
	}
	host, err := qemu.Probe(ctx, r.qemu(cfg))
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp(r.local.Dir, "b")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	share := filepath.Join(dir, "share")
	if err := os.Mkdir(share, 0o755); err != nil {
		return 0, err
	}
	spec := cfg.Sandbox.Machine
	spec.Name = "bare"
	spec.KernelParams = append(slices.Clip(spec.KernelParams), boot.TrivialParam)
	spec.Shares = []hypervisor.Share{{Tag: storage.Tag, Dir: share}}
	began := make(chan time.Time, 1)
	said := make(chan time.Time, 1)
	vm, err := qemu.Start(listen(ctx, strings.TrimSpace(boot.TrivialLine), said), spec, qemu.Options{
		Config: cfg.QEMU, Host: host, Dir: dir,
		Started: func(p hypervisor.Process) error {
			if p.Role == "qemu" {
				began <- time.Now()
			}
			return nil
		},
	})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, vm.Kill()) }()
	select {
	case t := <-said:
		return t.Sub(<-began), nil
	case <-vm.Done():
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select { // both at once
	case t := <-said:
		return t.Sub(<-began), nil
	default:
		return 0, fmt.Errorf("it ended without a word: %w", vm.Err())
	}
}

// listen has a machine's log tell when its console says a line. Asking for the
// console instead would take the time from the machine.
func listen(ctx context.Context, line string, said chan<- time.Time) context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(log.DebugLevel)
	l.AddHook(consoleLine{line, said})
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

type consoleLine struct {
	text string
	said chan<- time.Time
}

// Levels implements logrus.Hook.
func (consoleLine) Levels() []logrus.Level { return []logrus.Level{log.DebugLevel} }

// Fire implements logrus.Hook.
func (c consoleLine) Fire(e *logrus.Entry) error {
	if line, _ := e.Data["line"].(string); strings.Contains(line, c.text) {
		select {
		case c.said <- e.Time:
		default: // it was said before
		}
	}
	return nil
}

// qemu is the configuration with the helper that lies beside the shim, where
// containerd's PATH finds it.
func (r *rig) qemu(cfg config.Config) qemu.Config {
	q := cfg.QEMU
	if path := filepath.Join(r.local.ShimDir(), "vhost-device-vsock"); q.VhostDeviceVsock == "" {
		if _, err := os.Stat(path); err == nil {
			q.VhostDeviceVsock = path
		}
	}
	return q
}

// firstByte runs a container that says a word and stays, and returns how long
// that took: as the shim's time line has it (machines only), and as ctr's user
// sees it.
func (r *rig) firstByte(ctx context.Context, runtime string) (line []sandbox.Phase, outer time.Duration, err error) {
	outer, err = r.firstWord(ctx, runtime, func(id string) (err error) {
		if runtime == machineRuntime {
			line, err = r.timeline(ctx, id)
		}
		return err
	})
	return line, outer, err
}

// firstWord is firstByte as ctr's user sees it; while the container stays, then is
// called.
func (r *rig) firstWord(ctx context.Context, runtime string, then func(id string) error, flags ...string) (time.Duration, error) {
	id := r.id()
	args := append([]string{"run", "--rm", "--runtime", runtime}, flags...)
	cmd := r.Ctr(ctx, append(args, ociimage.Name, id, "sh", "-c", "echo ready; exec sleep 1000")...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	word, err := bufio.NewReader(out).ReadString('\n')
	took := time.Since(began)
	if err == nil && word != "ready\n" {
		err = fmt.Errorf("first line %q", word)
	}
	if err == nil && then != nil {
		err = then(id)
	}
	killed := r.Ctr(ctx, "task", "kill", "--signal", "SIGKILL", id).Run()
	_ = cmd.Wait() // exit code 137
	return took, errors.Join(err, killed)
}

// timeline reads from a sandbox's state how its start went. The first output is
// written there after it has arrived here.
func (r *rig) timeline(ctx context.Context, id string) ([]sandbox.Phase, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for tick := time.Tick(10 * time.Millisecond); ; {
		st, err := r.state(id)
		if err != nil {
			return nil, err
		}
		if length(st.Timeline) > 0 {
			return st.Timeline, nil
		}
		select {
		case <-tick:
		case <-ctx.Done():
			return nil, fmt.Errorf("the time line of %s has no output in it: %v", id, st.Timeline)
		}
	}
}

func (r *rig) state(id string) (*sandbox.State, error) {
	return sandbox.ReadState(sandbox.Dir(r.local.StateDir(), r.Address(), "default", id))
}

func (r *rig) id() string { return idOf(r.ids.Add(1)) }

// next is what id will say.
func (r *rig) next() string { return idOf(r.ids.Load() + 1) }

func idOf(n int64) string { return fmt.Sprintf("bench-%d-%d", os.Getpid(), n) }
