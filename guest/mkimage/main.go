// Command mkimage makes the guest image, a kernel and an initramfs, from
// Debian packages and the agent. It needs no root and installs nothing; the
// packages are those that the machine's own apt offers, kept in a cache
// directory. The same packages and the same agent give the same bytes.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
)

type options struct {
	agent, cache, lists, out, kernel, arch string
}

func main() { os.Exit(run()) }

func run() int {
	var o options
	flag.StringVar(&o.agent, "agent", "", "the static `binary` of the agent")
	flag.StringVar(&o.cache, "cache", "", "`directory` that keeps downloaded packages")
	flag.StringVar(&o.lists, "lists", "guest", "`directory` of modules.txt and tools.txt")
	flag.StringVar(&o.out, "out", "", "`directory` for vmlinux, initrd.img and manifest.txt")
	flag.StringVar(&o.kernel, "kernel", "", "kernel `package` (or one that depends on it) instead of the newest, or a file that guest/mkkernel made")
	flag.StringVar(&o.arch, "arch", runtime.GOARCH, "Debian's name of the `architecture`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := build(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		return 1
	}
	return 0
}

// images are the files that are made.
var images = []string{"vmlinux", "initrd.img", "manifest.txt"}

func build(ctx context.Context, o options) error {
	made, err := inputs(ctx, o)
	if err != nil || isFresh(o.out, made) {
		return err
	}
	a := apt{dir: o.cache}
	k, err := chooseKernel(ctx, a, o)
	if err != nil {
		return err
	}
	t, tools, err := image(ctx, a, k, o)
	if err != nil {
		return err
	}
	var initrd bytes.Buffer
	if err := writeCPIO(&initrd, t); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{
		{images[0], k.image},
		{images[1], initrd.Bytes()},
		{images[2], manifest(append([]pkg{k.pkg}, tools...))},
		{inputsName, made}, // the last one: what it says is there
	} {
		if err := replace(filepath.Join(o.out, f.name), f.data); err != nil {
			return err
		}
	}
	return nil
}

// image is the content of the initramfs.
func image(ctx context.Context, a apt, k *kernel, o options) (tree, []pkg, error) {
	t := skeleton()
	agent, err := os.ReadFile(o.agent)
	if err != nil {
		return nil, nil, err
	}
	t.file("usr/bin/vmshim-agent", 0o755, agent)
	wishes, err := parseList(o.lists, "modules.txt", parseWishes)
	if err != nil {
		return nil, nil, err
	}
	if err := addModules(ctx, t, k, wishes); err != nil {
		return nil, nil, err
	}
	tools, err := parseList(o.lists, "tools.txt", parseTools)
	if err != nil {
		return nil, nil, err
	}
	pkgs, err := addTools(ctx, t, a, tools)
	return t, pkgs, err
}

// skeleton has the directories that mounts and programs expect, and what the
// kernel wants before anything runs.
func skeleton() tree {
	t := tree{}
	for _, d := range []string{"dev", "etc", "proc", "root", "run", "sys", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var"} {
		t.dir(d, 0o755)
	}
	t.dir("tmp", 0o1777)
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		t.link(d, "usr/"+d)
	}
	t.link("var/run", "../run")
	t.link("init", "usr/bin/vmshim-agent")
	t.link("usr/bin/modprobe", "vmshim-agent")
	t.char("dev/console", 0o600, 5, 1) // standard output of the first process
	t.char("dev/null", 0o666, 1, 3)
	t.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	t.file("etc/group", 0o644, []byte("root:x:0:\n"))
	t.file("etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	t.file("etc/resolv.conf", 0o644, nil)
	return t
}

func parseList[T any](dir, name string, parse func(string) (T, error)) (list T, err error) {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return list, err
	}
	return parse(string(text))
}

// manifest says which packages are in the image.
func manifest(pkgs []pkg) []byte {
	var b strings.Builder
	for _, p := range pkgs {
		fmt.Fprintf(&b, "%s\t%s\t%s\t%s\n", p.Name, p.Version, p.Arch, p.SHA256)
	}
	return []byte(b.String())
}

// replace writes a file that running machines may have open.
func replace(name string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	tmp := name + ".new"
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}
