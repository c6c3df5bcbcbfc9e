package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmshim/vmshim/test/ociimage"
)

// Generations are the containerds that the shim is tested under: Debian's, the
// last 1.x and the newest 2.x.
var Generations = []string{"debian", "1", "2"}

// Local is what a daemon needs of this checkout: its shim, its guest image.
// Everything that is written lies under Dir.
type Local struct {
	Root string // of the checkout
	Dir  string
}

// NewLocal writes the shim's configuration, extra lines of it included, and the
// test image into dir.
func NewLocal(ctx context.Context, dir string, extra ...string) (*Local, error) {
	root, err := checkout()
	if err != nil {
		return nil, err
	}
	l := &Local{Root: root, Dir: dir}
	if err := os.WriteFile(l.ShimConfig(), []byte(l.Config(extra...)), 0o600); err != nil {
		return nil, err
	}
	archive, err := os.Create(l.archive())
	if err != nil {
		return nil, err
	}
	defer archive.Close()
	return l, ociimage.Write(ctx, archive, ociimage.Busybox)
}

// Built checks that everything was built.
func (l *Local) Built() error {
	for _, path := range []string{l.ShimDir() + "/containerd-shim-vm-v2", l.Kernel(), l.Initrd()} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("run 'make all' first: %w", err)
		}
	}
	return nil
}

// Config is a shim configuration with the paths of this checkout. Extra lines
// are keys of the top level. Templates are in Dir, unless one of them says where.
func (l *Local) Config(extra ...string) string {
	if !slices.ContainsFunc(extra, func(line string) bool { return strings.HasPrefix(line, templateDir) }) {
		extra = append(slices.Clip(extra), TemplateDir(filepath.Join(l.Dir, "templates")))
	}
	return fmt.Sprintf("state_dir = '%s'\n%s\n[machine]\nkernel = '%s'\ninitrd = '%s'\n",
		l.StateDir(), strings.Join(extra, "\n"), l.Kernel(), l.Initrd())
}

// MakeTemplates makes those of the shim's configuration.
func (l *Local) MakeTemplates(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, filepath.Join(l.ShimDir(), "vmshim"), "make-templates", "--config", l.ShimConfig())
	cmd.Env = append(os.Environ(), "PATH="+l.ShimDir()+":"+os.Getenv("PATH"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make templates: %w: %s", err, out)
	}
	return nil
}

// MakeTemplates makes those of plain sandboxes, where there are none yet, in a
// directory that several Locals share.
func MakeTemplates(ctx context.Context, templates string) (err error) {
	if made, err := os.ReadDir(templates); err != nil || len(made) > 0 {
		return err
	}
	dir, err := os.MkdirTemp("", "local")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	l, err := NewLocal(ctx, dir, TemplateDir(templates))
	if err != nil {
		return err
	}
	return l.MakeTemplates(ctx)
}

// TemplateDir is the line of a configuration for a directory of templates. With
// an empty one machines boot.
func TemplateDir(dir string) string { return fmt.Sprintf("%s = '%s'", templateDir, dir) }

const templateDir = "template_dir"

// Start runs a containerd of the generation with the image imported.
func (l *Local) Start(ctx context.Context, generation string) (*Daemon, error) {
	return l.start(ctx, generation, nil)
}

// StartCRI is Start with the CRI plugin, and with crictl.
func (l *Local) StartCRI(ctx context.Context, generation string, cri CRI) (*Daemon, error) {
	var err error
	if cri.Tools, err = l.Hack(ctx, "critest"); err != nil {
		return nil, err
	}
	return l.start(ctx, generation, &cri)
}

func (l *Local) start(ctx context.Context, generation string, cri *CRI) (*Daemon, error) {
	bin, err := l.Hack(ctx, "containerd", generation)
	if err != nil {
		return nil, err
	}
	d, err := Start(ctx, Config{
		Bin: bin, Dir: l.Dir, ShimDir: l.ShimDir(), Env: []string{"VMSHIM_CONFIG=" + l.ShimConfig()}, CRI: cri,
	})
	if err != nil {
		return nil, err
	}
	return d, d.Import(ctx, l.archive())
}

// ShimDir has the built programs in it.
func (l *Local) ShimDir() string { return filepath.Join(l.Root, "_output/bin") }

// Kernel is the guest's kernel.
func (l *Local) Kernel() string { return filepath.Join(l.guest(), "vmlinux") }

// Initrd is the guest's initramfs.
func (l *Local) Initrd() string { return filepath.Join(l.guest(), "initrd.img") }

// guest is the directory of the guest image: the checkout's, or another one
// that VMSHIM_GUEST names.
func (l *Local) guest() string {
	if dir := os.Getenv("VMSHIM_GUEST"); dir != "" {
		return dir
	}
	return filepath.Join(l.Root, "_output/guest")
}

// StateDir is the shim's, where each sandbox has a directory.
func (l *Local) StateDir() string { return filepath.Join(l.Dir, "vm") }

func (l *Local) archive() string { return filepath.Join(l.Dir, "busybox.tar") }

// ShimConfig is the shim's configuration file.
func (l *Local) ShimConfig() string { return filepath.Join(l.Dir, "vmshim.toml") }

// Hack runs a script of hack/ and returns the line that it prints.
func (l *Local) Hack(ctx context.Context, script string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(l.Root, "hack", script), args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("hack/%s %s: %w", script, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// checkout walks up from the working directory to go.mod.
func checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == "/" {
			return "", fmt.Errorf("no go.mod above the working directory")
		}
	}
}
