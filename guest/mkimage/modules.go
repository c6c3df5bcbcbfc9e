package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/vmshim/vmshim/internal/guest/module"
)

// A wish is a line of modules.txt.
type wish struct {
	boot     bool // before the agent starts
	pattern  string
	optional bool
}

func parseWishes(text string) ([]wish, error) {
	var wishes []wish
	for n, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		var w wish
		switch {
		case len(f) == 0:
			continue
		case len(f) == 2 && f[0] == module.BootName:
			w.boot = true
		case len(f) > 1:
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

// addModules puts the modules that are wished for, what they need, the index
// and the list for the boot into the tree.
func addModules(ctx context.Context, t tree, k *kernel, wishes []wish) error {
	s := newKos(k)
	var all, boot []string
	for _, w := range wishes {
		names := matching(w.pattern, s.files)
		if len(names) == 0 && !w.optional && len(matching(w.pattern, k.builtin())) == 0 {
			return fmt.Errorf("modules.txt: kernel %s has no %s", k.Release, w.pattern)
		}
		for _, name := range names {
			before := len(all)
			var err error
			if all, err = s.order(ctx, name, all); err != nil {
				return err
			}
			if w.boot {
				boot = append(boot, all[before:]...)
			}
		}
	}
	const dir = "usr" + module.Dir
	files := map[string]string{} // by name
	for _, name := range all {
		m := s.loaded[name]
		file, data := path.Base(m.file), k.files[m.file].data
		if !k.has("MODULE_DECOMPRESS") {
			file, data = name+".ko", m.plain
		}
		if slices.Contains(boot, name) { // time counts more than memory
			file, data = name+".ko", unsign(m.plain)
		}
		files[name] = file
		t.file(path.Join(dir, file), 0o644, data)
	}
	var list strings.Builder
	for _, name := range boot {
		fmt.Fprintln(&list, files[name])
	}
	t.file(path.Join(dir, module.BootName), 0o644, []byte(list.String()))
	index, err := s.index(ctx, all, files)
	t.file(path.Join(dir, module.IndexName), 0o644, index)
	return err
}

// index is the text that tells the guest of the modules.
func (s *kos) index(ctx context.Context, all []string, files map[string]string) ([]byte, error) {
	var x module.Index
	for _, name := range slices.Sorted(slices.Values(all)) {
		deps, err := s.order(ctx, name, nil)
		if err != nil {
			return nil, err
		}
		x.Modules = append(x.Modules, module.Module{Name: name, File: files[name], Deps: deps[:len(deps)-1]})
		for _, alias := range s.loaded[name].aliases {
			x.Aliases = append(x.Aliases, module.Alias{Pattern: alias, Name: name})
		}
	}
	x.Builtins = slices.Sorted(maps.Keys(s.k.builtin()))
	var text bytes.Buffer
	_, err := x.WriteTo(&text)
	return text.Bytes(), err
}

// builtin are the names of what the kernel does not need a module for.
func (k *kernel) builtin() map[string]bool {
	names := map[string]bool{}
	for f := range strings.FieldsSeq(string(k.files["usr/lib/modules/"+k.Release+"/modules.builtin"].data)) {
		names[module.Canonical(strings.TrimSuffix(path.Base(f), ".ko"))] = true
	}
	return names
}

// unsign cuts the signature off (struct module_signature and the magic behind
// it, include/linux/module_signature.h). Checking it takes the guest longer
// than all else about a module; the image is as good as the kernel in it.
func unsign(ko []byte) []byte {
	const magic = "~Module signature appended~\n"
	const header = 12 // its last 4 bytes are the length of the signature before it
	rest, ok := bytes.CutSuffix(ko, []byte(magic))
	if !ok || len(rest) < header {
		return ko
	}
	length := int(binary.BigEndian.Uint32(rest[len(rest)-4:]))
	if length > len(rest)-header {
		return ko
	}
	return rest[:len(rest)-header-length]
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
