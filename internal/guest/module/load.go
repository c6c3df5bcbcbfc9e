package module

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A Loader loads the modules of one directory. It may be used by several
// goroutines.
type Loader struct {
	dir   string
	index func() (*Index, error)

	mu     sync.Mutex
	loaded map[string]bool // guarded by mu: file names
}

// New makes a loader for the modules in dir. The index is read when a module is
// asked for by name for the first time. Without one every name is unknown.
func New(dir string) *Loader {
	return &Loader{
		dir:    dir,
		index:  sync.OnceValues(func() (*Index, error) { return read(dir) }),
		loaded: map[string]bool{},
	}
}

func read(dir string) (*Index, error) {
	f, err := os.Open(filepath.Join(dir, IndexName))
	if errors.Is(err, os.ErrNotExist) {
		return &Index{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	index, err := Parse(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return index, nil
}

// LoadBoot loads the modules that are loaded always, as far as it can.
func (l *Loader) LoadBoot() error {
	list, err := os.ReadFile(filepath.Join(l.dir, BootName))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var errs []error
	for file := range strings.FieldsSeq(string(list)) {
		errs = append(errs, l.insert(file, ""))
	}
	return errors.Join(errs...)
}

// Load loads what has the name or alias, after all it needs. Options are the
// module's, as on modprobe's command line. What is already there is no error; so
// is what the kernel has built in, which takes its options from the kernel's
// command line.
func (l *Loader) Load(name, options string) error {
	index, err := l.index()
	if err != nil {
		return err
	}
	found, err := index.Lookup(name)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range found {
		if err := l.load(index, m, options); err != nil {
			errs = append(errs, fmt.Errorf("load module %s: %w", m.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (l *Loader) load(index *Index, m Module, options string) error {
	for _, dep := range m.Deps {
		if d, ok := index.module(dep); ok {
			if err := l.insert(d.File, ""); err != nil {
				return err
			}
		}
	}
	return l.insert(m.File, options)
}

func (l *Loader) insert(file, options string) error {
	if l.has(file) {
		return nil
	}
	f, err := os.Open(filepath.Join(l.dir, file))
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(file, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE // the kernel decompresses what it compressed
	}
	err = unix.FinitModule(int(f.Fd()), options, flags)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("insert %s: %w", file, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.loaded[file] = true
	return nil
}

// has spares the kernel from reading a module only to find that it is there.
// Nobody unloads modules.
func (l *Loader) has(file string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.loaded[file]
}

// Modprobe is the program that the kernel runs (kernel.modprobe) to get a
// module it misses: modprobe -q -- NAME. It returns the exit status.
func Modprobe(args []string) int {
	l := New(Dir)
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
