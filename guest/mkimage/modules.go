package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/vmshim/vmshim/internal/guest/module"
)

// A wish is a line of modules.txt.
type wish struct {
	pattern        string
	boot, optional bool
}

func parseWishes(text string) ([]wish, error) {
	var wishes []wish
	for n, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		w := wish{boot: len(f) == 2 && f[0] == "boot"}
		if len(f) == 0 {
			continue
		}
		if len(f) > 1 && !w.boot {
			return nil, fmt.Errorf("modules.txt:%d: %q", n+1, line)
		}
		w.pattern, w.optional = strings.CutSuffix(f[len(f)-1], "?")
		if _, err := path.Match(w.pattern, ""); err != nil {
			return nil, fmt.Errorf("modules.txt:%d: %w", n+1, err)
		}
		wishes = append(wishes, w)
	}
	return wishes, nil
}

// A ko is a module of the kernel's package.
type ko struct {
	file    string // below the modules' directory of the package
	deps    []string
	aliases []string
	plain   []byte // decompressed
}

// kos reads the facts a module has about itself, as far as they are needed.
type kos struct {
	k      *kernel
	files  map[string]string // by name
	loaded map[string]*ko
}

func newKos(k *kernel) *kos {
	s := &kos{k: k, files: map[string]string{}, loaded: map[string]*ko{}}
	for name := range k.files {
		if base, _, ok := strings.Cut(path.Base(name), ".ko"); ok {
			s.files[module.Canonical(base)] = name
		}
	}
	return s
}

func (s *kos) get(ctx context.Context, name string) (*ko, error) {
	if m, ok := s.loaded[name]; ok {
		return m, nil
	}
	file, ok := s.files[name]
	if !ok {
		return nil, fmt.Errorf("kernel %s has no module %s", s.k.Release, name)
	}
	plain, err := decompress(ctx, s.k.files[file].data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	m := &ko{file: file, plain: plain}
	if err := m.readInfo(); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	s.loaded[name] = m
	return m, nil
}

// readInfo reads the section that modinfo(8) shows.
func (m *ko) readInfo() error {
	f, err := elf.NewFile(bytes.NewReader(m.plain))
	if err != nil {
		return err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return fmt.Errorf("no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return err
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					m.deps = append(m.deps, module.Canonical(d))
				}
			}
		case "alias":
			m.aliases = append(m.aliases, value)
		}
	}
	return nil
}

// order appends what the module needs, each before its users, and itself.
func (s *kos) order(ctx context.Context, name string, done []string) ([]string, error) {
	if slices.Contains(done, name) {
		return done, nil
	}
	m, err := s.get(ctx, name)
	if err != nil {
		return nil, err
	}
	for _, d := range m.deps {
		if done, err = s.order(ctx, d, done); err != nil {
			return nil, err
		}
	}
	return append(done, name), nil
}

// addModules puts the modules that are wished for, what they need, and the
// index into the tree.
func addModules(ctx context.Context, t tree, k *kernel, wishes []wish) error {
	s := newKos(k)
	builtin := map[string]bool{}
	for f := range strings.FieldsSeq(string(k.files["usr/lib/modules/"+k.Release+"/modules.builtin"].data)) {
		builtin[module.Canonical(strings.TrimSuffix(path.Base(f), ".ko"))] = true
	}
	var index module.Index
	var all []string
	boot := map[string]bool{}
	for _, w := range wishes {
		names := matching(w.pattern, s.files)
		if len(names) == 0 && len(matching(w.pattern, builtin)) == 0 && !w.optional {
			return fmt.Errorf("modules.txt: kernel %s has no %s", k.Release, w.pattern)
		}
		for _, name := range names {
			var err error
			if all, err = s.order(ctx, name, all); err != nil {
				return err
			}
			if w.boot {
				index.Boot = append(index.Boot, name)
				for _, b := range all { // boot lines come first: so far they are all
					boot[b] = true
				}
			}
		}
	}
	slices.Sort(all)
	for _, name := range all {
		m := s.loaded[name]
		deps, err := s.order(ctx, name, nil)
		if err != nil {
			return err
		}
		file, data := path.Base(m.file), k.files[m.file].data
		if boot[name] || !k.has("MODULE_DECOMPRESS") { // at boot, time counts more than memory
			file, data = name+".ko", m.plain
		}
		t.file(path.Join("usr", module.Dir, file), 0o644, data)
		index.Modules = append(index.Modules, module.Module{Name: name, File: file, Deps: deps[:len(deps)-1]})
		for _, alias := range m.aliases {
			index.Aliases = append(index.Aliases, module.Alias{Pattern: alias, Name: name})
		}
	}
	var text bytes.Buffer
	if _, err := index.WriteTo(&text); err != nil {
		return err
	}
	t.file(path.Join("usr", module.Dir, module.IndexName), 0o644, text.Bytes())
	return nil
}

func matching[V any](pattern string, names map[string]V) []string {
	var found []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if ok, _ := path.Match(pattern, name); ok { // patterns were checked
			found = append(found, name)
		}
	}
	return found
}
