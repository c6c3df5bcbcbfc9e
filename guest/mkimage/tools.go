package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// A tool is a line of tools.txt.
type tool struct {
	pkg, pattern string
	links        []string
}

func parseTools(text string) ([]tool, error) {
	var tools []tool
	for n, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 2 || !strings.HasPrefix(f[1], "/") {
			return nil, fmt.Errorf("tools.txt:%d: %q", n+1, line)
		}
		tools = append(tools, tool{pkg: f[0], pattern: merged(f[1][1:]), links: f[2:]})
	}
	return tools, nil
}

// addTools puts the programs into the tree, with the shared libraries they
// need. It returns the packages that something was taken from.
func addTools(ctx context.Context, t tree, a apt, tools []tool) ([]pkg, error) {
	debs, err := openDebs(ctx, a, tools)
	if err != nil {
		return nil, err
	}
	for _, tool := range tools {
		names := matching(tool.pattern, debs.files)
		if len(names) == 0 {
			return nil, fmt.Errorf("tools.txt: package %s has no /%s", tool.pkg, tool.pattern)
		}
		for _, name := range names {
			if err := debs.copy(t, name); err != nil {
				return nil, err
			}
		}
		for _, l := range tool.links {
			t.link(path.Join(path.Dir(names[0]), l), path.Base(names[0]))
		}
	}
	return debs.used(), nil
}

// debs are the files of several packages.
type debs struct {
	files tree
	from  map[string]pkg    // by file
	libs  map[string]string // file by its name without directories
	taken map[string]bool   // package names
}

// openDebs reads the tools' packages and the packages of their libraries.
func openDebs(ctx context.Context, a apt, tools []tool) (*debs, error) {
	d := &debs{files: tree{}, from: map[string]pkg{}, libs: map[string]string{}, taken: map[string]bool{}}
	seen := map[string]bool{}
	var next []string
	for _, t := range tools {
		next = append(next, t.pkg)
	}
	for len(next) > 0 {
		slices.Sort(next)
		found, err := a.find(ctx, slices.Compact(next)...)
		if err != nil {
			return nil, err
		}
		next = nil
		for _, name := range slices.Sorted(maps.Keys(found)) {
			if err := d.read(ctx, a, found[name]); err != nil {
				return nil, err
			}
			seen[name] = true
			for _, dep := range found[name].Depends {
				if strings.HasPrefix(dep, "lib") && !seen[dep] { // shared libraries are in such packages
					next = append(next, dep)
				}
			}
		}
	}
	return d, nil
}

func (d *debs) read(ctx context.Context, a apt, p pkg) error {
	deb, err := a.fetch(ctx, p)
	if err != nil {
		return err
	}
	files, err := readDeb(ctx, deb, func(name string) bool { return strings.HasPrefix(name, "usr/") })
	for name, n := range files {
		d.files[name], d.from[name] = n, p
		if ok, _ := path.Match("usr/lib/*/*.so*", name); ok { // Debian's multiarch directory
			d.libs[path.Base(name)] = name
		}
	}
	return err
}

// copy puts a file into the tree with what it needs: the target of a link, the
// interpreter and the libraries of a program.
func (d *debs) copy(t tree, name string) error {
	if _, ok := t[name]; ok {
		return nil
	}
	n, ok := d.files[name]
	if !ok {
		return fmt.Errorf("no package has /%s", name)
	}
	d.taken[d.from[name].Name] = true
	if n.mode&modeType == modeLink {
		target := string(n.data)
		t.link(name, target)
		if !path.IsAbs(target) {
			target = "/" + path.Join(path.Dir(name), target)
		}
		return d.copy(t, merged(target[1:]))
	}
	t.file(name, n.mode&0o777, n.data)
	needed, err := dependencies(n.data)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, file := range needed {
		if path.IsAbs(file) {
			file = merged(file[1:])
		} else if file, ok = d.libs[file]; !ok {
			return fmt.Errorf("%s: no package has what it needs: %v", name, needed)
		}
		if err := d.copy(t, file); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// dependencies are the names of a program's libraries and the path of its
// interpreter.
func dependencies(program []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, err
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			interp, err := io.ReadAll(p.Open())
			if err != nil {
				return nil, err
			}
			needed = append(needed, string(bytes.TrimRight(interp, "\x00")))
		}
	}
	return needed, nil
}

// used are the packages that something was taken from.
func (d *debs) used() []pkg {
	byName := map[string]pkg{}
	for _, p := range d.from {
		byName[p.Name] = p
	}
	var pkgs []pkg
	for _, name := range slices.Sorted(maps.Keys(d.taken)) {
		pkgs = append(pkgs, byName[name])
	}
	return pkgs
}
