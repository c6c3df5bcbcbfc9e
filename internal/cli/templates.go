package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// A template is that of one kind of sandbox.
type template struct {
	For    string    `json:"for"`
	Path   string    `json:"path,omitempty"` // empty: there is none
	Size   int64     `json:"size,omitempty"` // in bytes
	Made   time.Time `json:"made,omitzero"`
	Failed string    `json:"failed,omitempty"` // why there is none, when it was tried
}

func templates(ctx context.Context, c *call) error {
	cfg, host, err := c.machine(ctx)
	if err != nil {
		return err
	}
	return c.printTemplates(cfg, host)
}

func (c *call) machine(ctx context.Context) (config.Config, *qemu.Host, error) {
	cfg, err := config.Load(c.configPath)
	if err != nil {
		return cfg, nil, err
	}
	if cfg.QEMU.TemplateDir == "" {
		return cfg, nil, errors.New("template_dir is empty: every machine boots")
	}
	host, err := qemu.Probe(ctx, cfg.QEMU)
	return cfg, host, err
}

// findTemplates looks for that of each kind of sandbox.
func findTemplates(cfg config.Config, host *qemu.Host) ([]template, error) {
	var list []template
	machines := cfg.Sandbox.Machines()
	for _, kind := range slices.Sorted(maps.Keys(machines)) {
		t, err := qemu.FindTemplate(machines[kind], cfg.QEMU, *host)
		if err != nil {
			return nil, err
		}
		list = append(list, template{kind, t.Path, t.Size, t.Made, t.Failed})
	}
	return list, nil
}

func (c *call) printTemplates(cfg config.Config, host *qemu.Host) error {
	list, err := findTemplates(cfg, host)
	if err != nil {
		return err
	}
	rows := [][]string{{"FOR", "MADE", "MIB", "FILE"}}
	for _, t := range list {
		row := []string{t.For, "-", "-", cmp.Or(t.Failed, "-")}
		if t.Path != "" {
			row = []string{t.For, t.Made.Format(time.DateTime), fmt.Sprint(t.Size >> 20), t.Path}
		}
		rows = append(rows, row)
	}
	return c.print(list, rows)
}

// makeTemplates makes them anew, and removes those that fit no machine any more.
func makeTemplates(ctx context.Context, c *call) error {
	cfg, host, err := c.machine(ctx)
	if err != nil {
		return err
	}
	var fit []string
	for kind := range cfg.Sandbox.Machines() {
		path, err := makeTemplate(ctx, cfg, host, kind)
		if err != nil {
			return err
		}
		fit = append(fit, path)
	}
	if err := qemu.RemoveTemplates(cfg.QEMU.TemplateDir, fit...); err != nil {
		return err
	}
	return c.printTemplates(cfg, host)
}

func makeTemplate(ctx context.Context, cfg config.Config, host *qemu.Host, kind string) (path string, err error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.Sandbox.StartTimeout)
	defer cancel()
	dir, err := os.MkdirTemp("", "vmshim-template")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	spec := cfg.Sandbox.Machines()[kind]
	spec.Name = "template-" + kind
	return qemu.MakeTemplate(ctx, spec, qemu.Options{Config: cfg.QEMU, Host: host, Dir: dir})
}
