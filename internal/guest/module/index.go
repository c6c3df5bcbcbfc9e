// Package module loads kernel modules of the guest from an index that is
// written when the image is made, so that nothing is scanned or sorted at
// boot. The index is a text file, one fact per line:
//
//	module NAME FILE NAME…    a module, its file, all that must be loaded before it, in order
//	alias PATTERN NAME        who serves a device or a protocol
//	builtin NAME              what the kernel has without a module
//
// FILE is relative to the directory of the index. Patterns are those of
// modules.alias (globs). Beside it, the file "boot" lists the modules that are
// loaded always, before the agent starts: one file name per line, in order.
package module

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Dir is where the image has its modules.
const Dir = "/lib/modules"

// Names of files in Dir.
const (
	IndexName = "index"
	BootName  = "boot"
)

// A Module is one file and what it needs.
type Module struct {
	Name string
	File string
	Deps []string // all of them, in load order
}

// An Alias maps a pattern to a module's name.
type Alias struct{ Pattern, Name string }

// An Index knows the modules of the image.
type Index struct {
	Modules  []Module
	Aliases  []Alias
	Builtins []string
}

// Canonical is the one spelling of a module's name: the kernel takes - and _
// for the same.
func Canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

// Parse reads an index.
func Parse(r io.Reader) (*Index, error) {
	var x Index
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		f := strings.Fields(s.Text())
		switch {
		case len(f) == 0:
		case f[0] == "module" && len(f) >= 3:
			x.Modules = append(x.Modules, Module{Name: f[1], File: f[2], Deps: f[3:]})
		case f[0] == "alias" && len(f) == 3:
			x.Aliases = append(x.Aliases, Alias{Pattern: f[1], Name: f[2]})
		case f[0] == "builtin" && len(f) == 2:
			x.Builtins = append(x.Builtins, f[1])
		default:
			return nil, fmt.Errorf("index line %d: %q", n, s.Text())
		}
	}
	return &x, s.Err()
}

// WriteTo writes the index in the form that Parse reads.
func (x *Index) WriteTo(w io.Writer) (int64, error) {
	var b strings.Builder
	for _, m := range x.Modules {
		fmt.Fprintln(&b, strings.Join(append([]string{"module", m.Name, m.File}, m.Deps...), " "))
	}
	for _, a := range x.Aliases {
		fmt.Fprintln(&b, "alias", a.Pattern, a.Name)
	}
	for _, name := range x.Builtins {
		fmt.Fprintln(&b, "builtin", name)
	}
	n, err := io.WriteString(w, b.String())
	return int64(n), err
}

// Lookup finds the module with the name, or the modules whose alias matches it:
// none for what the kernel has built in.
func (x *Index) Lookup(name string) ([]Module, error) {
	if m, ok := x.module(Canonical(name)); ok {
		return []Module{m}, nil
	}
	if slices.Contains(x.Builtins, Canonical(name)) {
		return nil, nil
	}
	var found []Module
	for _, a := range x.Aliases {
		if ok, err := path.Match(a.Pattern, name); err != nil || !ok {
			continue
		}
		if m, ok := x.module(a.Name); ok && !slices.ContainsFunc(found, func(f Module) bool { return f.Name == m.Name }) {
			found = append(found, m)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("module %.100q: %w", name, errdefs.ErrNotFound)
	}
	return found, nil
}

func (x *Index) module(name string) (Module, bool) {
	i := slices.IndexFunc(x.Modules, func(m Module) bool { return m.Name == name })
	if i < 0 {
		return Module{}, false
	}
	return x.Modules[i], true
}
