package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A template is made where the configuration wants one, and where there is none.
func TestEnsureTemplateWanted(t *testing.T) {
	kvm := func(o *Options) {
		host := *o.Host
		host.Accelerator = KVM
		o.Host = &host
	}
	for name, tt := range map[string]struct {
		change func(*Options)
		tried  bool
	}{
		"emulated, where QEMU emulates":  {func(o *Options) { o.Config.MakeTemplates = MakeEmulated }, true},
		"emulated, where there is KVM":   {func(o *Options) { o.Config.MakeTemplates = MakeEmulated; kvm(o) }, false},
		"always, where QEMU emulates":    {func(o *Options) { o.Config.MakeTemplates = MakeAlways }, true},
		"never, where QEMU emulates":     {func(o *Options) { o.Config.MakeTemplates = MakeNever }, false},
		"not said":                       {func(*Options) {}, false},
		"always, without a directory":    {func(o *Options) { o.Config.MakeTemplates, o.Config.TemplateDir = MakeAlways, "" }, false},
		"always, in one that can't be":   {func(o *Options) { o.Config.MakeTemplates, o.Config.TemplateDir = MakeAlways, "/proc/none" }, false},
		"always, while another makes it": {func(o *Options) { o.Config.MakeTemplates = MakeAlways; lock(t, o.Config.TemplateDir) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s, opts := templateMachine(t)
			tt.change(&opts)
			tried := false
			opts.Started = func(hypervisor.Process) error { tried = true; return nil }
			made, err := EnsureTemplate(within(t), s, opts)
			if wantErr := tt.tried || opts.Config.TemplateDir == "/proc/none"; made || tried != tt.tried || (err != nil) != wantErr {
				t.Errorf("made %v, tried %v, %v", made, tried, err)
			}
		})
	}
}

// One that could not be made is left alone for an hour, and why is known. A start
// that was cancelled says nothing about the next one.
func TestEnsureTemplateFails(t *testing.T) {
	s, opts := templateMachine(t)
	opts.Config.MakeTemplates = MakeAlways
	tries := 0
	ensure := func(ctx context.Context, want int) error {
		t.Helper()
		before := tries
		opts.Started = func(p hypervisor.Process) error {
			if p.Role == roleQEMU {
				tries++
			}
			return nil
		}
		made, err := EnsureTemplate(ctx, s, opts)
		if made || tries-before != want {
			t.Errorf("made %v after %d tries, not %d", made, tries-before, want)
		}
		return err
	}
	ctx, cancel := context.WithCancel(within(t))
	cancel()
	if err := ensure(ctx, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	checkEmpty(t, opts.Config.TemplateDir)
	const why = "qemu ended: exit status 0"
	if err := ensure(within(t), 1); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("first: %v", err)
	}
	if err := ensure(within(t), 0); err != nil {
		t.Errorf("at once: %v", err)
	}
	if found, err := FindTemplate(s, opts.Config, *opts.Host); err != nil || found.Path != "" || !strings.Contains(found.Failed, why) {
		t.Errorf("found %+v, %v", found, err)
	}
	path, err := opts.Config.templateFile(s, *opts.Host)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path+failedSuffix, time.Time{}, time.Now().Add(-retryAfter)); err != nil {
		t.Fatal(err)
	}
	if err := ensure(within(t), 1); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("an hour later: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ensure(within(t), 0); err != nil {
		t.Errorf("where there is one: %v", err)
	}
}

// templateMachine is one whose QEMU dies when it is to be written.
func templateMachine(t *testing.T) (hypervisor.Spec, Options) {
	t.Helper()
	s, opts := fakeMachine(t, behaviour{qemu: "migrating"})
	opts.Config.TemplateDir = filepath.Join(t.TempDir(), "templates")
	return s, opts
}

// lock takes the place of another process that makes a template.
func lock(t *testing.T, dir string) {
	t.Helper()
	f, err := lockTemplates(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
}

// Two never make templates in one directory at the same time.
func TestMakeTemplateBusy(t *testing.T) {
	s, opts := templateMachine(t)
	lock(t, opts.Config.TemplateDir)
	if _, err := MakeTemplate(within(t), s, opts); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("error %v", err)
	}
	checkEmpty(t, opts.Config.TemplateDir)
}

// What is left of makers that died goes, and what was not used for the longest.
func TestTidyTemplates(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, used, made time.Duration) {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Now().Add(-used), time.Now().Add(-made)); err != nil {
			t.Fatal(err)
		}
	}
	name := func(i int) string { return fmt.Sprintf("%016x", i) }
	const oldest = 1000 * time.Hour
	file("other", oldest, oldest)
	file(".newest", oldest, oldest)
	file(newPrefix+"123", 0, 0)
	file(name(100)+failedSuffix, 0, retryAfter/2)
	file(name(101)+failedSuffix, 0, 2*retryAfter)
	for i := range maxTemplates {
		file(name(i), time.Duration(i)*time.Hour, time.Duration(i)*time.Hour)
	}
	markUsed(filepath.Join(dir, name(maxTemplates-1))) // the first that was made
	if err := tidyTemplates(dir); err != nil {
		t.Fatal(err)
	}
	check := func(want map[string]bool) {
		t.Helper()
		for name, there := range want {
			if _, err := os.Stat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) == there {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	check(map[string]bool{
		"other": true, ".newest": true,
		newPrefix + "123": false, name(100) + failedSuffix: true, name(101) + failedSuffix: false,
		name(0): true, name(maxTemplates - 3): true, name(maxTemplates - 2): false, name(maxTemplates - 1): true,
	})
	if err := RemoveTemplates(dir, filepath.Join(dir, name(1))); err != nil {
		t.Fatal(err)
	}
	check(map[string]bool{"other": true, ".newest": true, name(100) + failedSuffix: false, name(0): false, name(1): true})
}

// An agent that serves but never says so can't be waited for.
func TestAwaitReady(t *testing.T) {
	for name, tt := range map[string]struct {
		qemu    string
		silence time.Duration
		kill    bool
		want    error
	}{
		"says so": {qemu: "ring", silence: silence},
		"silent":  {qemu: "old", silence: 10 * time.Millisecond, want: errSilent},
		"gone":    {qemu: "serve", silence: silence, kill: true, want: errGone},
	} {
		t.Run(name, func(t *testing.T) {
			vm := startFake(t, behaviour{qemu: tt.qemu})
			ctx, end, err := vm.begin(within(t))
			if err != nil {
				t.Fatal(err)
			}
			defer end()
			vm.silence = tt.silence
			if tt.kill {
				go vm.Kill() //nolint:errcheck // it waits for what has begun
			}
			if err := vm.awaitReady(ctx); !errors.Is(err, tt.want) {
				t.Errorf("error %v", err)
			}
		})
	}
}
