package vmtest

import (
	"errors"
	"os"
	"sync"
	"testing"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// Resume is Boot for tests that are not about the boot: the machine goes on from a
// template, which is made for the first of its kind. That is worth it for a kind
// that several tests use, most of all where the host is emulated and a boot takes
// the best part of a minute.
func Resume(tb testing.TB, change ...func(*hypervisor.Spec)) *Machine {
	tb.Helper()
	Need(tb, Root, QEMU, Share, Image)
	spec, opts := changed(tb, change), Options(tb)
	var err error
	opts.Config.TemplateDir, err = Templates(func(dir string) error {
		opts := opts
		opts.Config.TemplateDir = dir
		t, err := qemu.FindTemplate(spec, opts.Config, *opts.Host)
		if err == nil && t.Path == "" {
			_, err = qemu.MakeTemplate(Context(tb), spec, opts)
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	m := start(tb, spec, opts)
	m.wait(tb)
	if m.Restored() {
		m.renew(tb)
	}
	return m
}

// Templates is a directory of templates that all tests of the process share. The
// first to ask makes them.
func Templates(makeIn func(dir string) error) (string, error) { return templates.with(makeIn) }

var templates templateDir

// A templateDir is made when it is first wanted. Run removes it.
type templateDir struct {
	mu   sync.Mutex
	path string // guarded by mu
}

// with has f see to it that what is needed is there, one f at a time.
func (d *templateDir) with(f func(dir string) error) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.path == "" {
		path, err := os.MkdirTemp("", "templates")
		if err != nil {
			return "", err
		}
		d.path = path
	}
	return d.path, f(d.path)
}

func (d *templateDir) remove() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return os.RemoveAll(d.path)
}

// renew changes what the guest has in common with others of its template.
func (m *Machine) renew(tb testing.TB) {
	tb.Helper()
	c := agent.New(agent.Settings{Dial: m.Dial, URL: m.AgentURL(extension.AgentPort)})
	if err := errors.Join(agent.Renew(Context(tb), c), c.Disconnect()); err != nil {
		tb.Fatal(err)
	}
}
