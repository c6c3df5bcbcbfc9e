package module

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A Loader loads the modules of one directory.
type Loader struct {
	dir   string
	index *Index
}

// Open reads the index in dir. A kernel without modules has none: then every
// name is unknown to the loader.
func Open(dir string) (*Loader, error) {
	f, err := os.Open(filepath.Join(dir, IndexName))
	if errors.Is(err, os.ErrNotExist) {
		return &Loader{dir: dir, index: &Index{}}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	index, err := Parse(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return &Loader{dir: dir, index: index}, nil
}

// Boot loads what the index wants at boot.
func (l *Loader) Boot() error {
	var errs []error
	for _, name := range l.index.Boot {
		errs = append(errs, l.Load(name, ""))
	}
	return errors.Join(errs...)
}

// Load loads what has the name or alias, after all it needs. Options are the
// module's, as on modprobe's command line. What is already there is no error.
func (l *Loader) Load(name, options string) error {
	found, err := l.index.Lookup(name)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range found {
		errs = append(errs, l.load(m, options))
	}
	return errors.Join(errs...)
}

func (l *Loader) load(m Module, options string) error {
	for _, dep := range m.Deps {
		if d, ok := l.index.module(dep); ok {
			if err := l.insert(d, ""); err != nil {
				return fmt.Errorf("load module %s: %w", m.Name, err)
			}
		}
	}
	if err := l.insert(m, options); err != nil {
		return fmt.Errorf("load module %s: %w", m.Name, err)
	}
	return nil
}

func (l *Loader) insert(m Module, options string) error {
	f, err := os.Open(filepath.Join(l.dir, m.File))
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(m.File, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE // the kernel decompresses what it compressed
	}
	err = unix.FinitModule(int(f.Fd()), options, flags)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("insert %s: %w", m.File, err)
	}
	return nil
}

// Modprobe is the program that the kernel runs (kernel.modprobe) to get a
// module it misses: modprobe -q -- NAME. It returns the exit status.
func Modprobe(args []string) int {
	l, err := Open(Dir)
	if err != nil {
		return 1
	}
	code := 0
	for _, name := range args {
		if strings.HasPrefix(name, "-") {
			continue
		}
		if l.Load(name, "") != nil {
			code = 1
		}
	}
	return code
}
