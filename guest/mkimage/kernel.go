package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"
)

// A kernel is what we take of a kernel's package.
type kernel struct {
	pkg
	Release string
	image   []byte // to boot: an ELF file on amd64
	config  string
	files   tree // modules.builtin and the modules, below usr/lib/modules/RELEASE
}

// metas are the packages that depend on Debian's newest kernel for virtual
// machines: the release's own, and the one of the next release for this one.
func metas(arch string) []string {
	return []string{"linux-image-cloud-" + arch, "linux-image-6.12-cloud-" + arch}
}

// findKernel returns the newest kernel that a meta package depends on.
func findKernel(ctx context.Context, a apt, names []string) (pkg, error) {
	found, err := a.find(ctx, names...)
	if err != nil {
		return pkg{}, err
	}
	var newest pkg
	for _, meta := range found {
		if newest.Name == "" || exec.CommandContext(ctx, "dpkg", "--compare-versions", meta.Version, "gt", newest.Version).Run() == nil {
			newest = meta
		}
	}
	for _, d := range newest.Depends {
		if !strings.HasPrefix(d, "linux-image-") {
			continue
		}
		found, err := a.find(ctx, d)
		if err != nil {
			return pkg{}, err
		}
		return found[d], nil
	}
	return pkg{}, fmt.Errorf("find kernel: apt knows none of %v (apt-get update may help)", names)
}

// chooseKernel gets the kernel that the options ask for.
func chooseKernel(ctx context.Context, a apt, o options) (*kernel, error) {
	if strings.HasSuffix(o.kernel, builtSuffix) {
		return readBuilt(ctx, o.kernel)
	}
	names := metas(o.arch)
	if o.kernel != "" {
		names = []string{o.kernel}
	}
	p, err := findKernel(ctx, a, names)
	if err != nil {
		return nil, err
	}
	deb, err := a.fetch(ctx, p)
	if err != nil {
		return nil, err
	}
	files, err := readDeb(ctx, deb, ofKernel)
	if err != nil {
		return nil, err
	}
	return newKernel(ctx, p, files)
}

// builtSuffix is how the file ends that guest/mkkernel makes: an archive like
// the one in a package, named as packages are, SOURCE_VERSION+KEY_ARCH.
const builtSuffix = ".tar"

func readBuilt(ctx context.Context, file string) (*kernel, error) {
	fields := strings.Split(strings.TrimSuffix(path.Base(file), builtSuffix), "_")
	if len(fields) != 3 {
		return nil, fmt.Errorf("kernel %s: not named NAME_VERSION_ARCH%s", file, builtSuffix)
	}
	sum, err := hashFile(file)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	files, err := readTar(f, ofKernel)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	return newKernel(ctx, pkg{Name: fields[0], Version: fields[1], Arch: fields[2], SHA256: sum}, files)
}

// ofKernel says which files of an archive newKernel wants.
func ofKernel(name string) bool {
	return strings.HasPrefix(name, "boot/") || strings.HasPrefix(name, "usr/lib/modules/")
}

func newKernel(ctx context.Context, p pkg, files tree) (_ *kernel, err error) {
	k := &kernel{pkg: p, files: tree{}}
	for name, n := range files {
		base := path.Base(name)
		switch {
		case path.Dir(name) != "boot":
			k.files[name] = n
		case strings.HasPrefix(base, "vmlinuz-"), strings.HasPrefix(base, "vmlinux-"):
			k.Release = base[len("vmlinuz-"):]
			if k.image, err = unpack(ctx, n.data); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		case strings.HasPrefix(base, "config-"):
			k.config = string(n.data)
		}
	}
	if k.image == nil {
		return nil, fmt.Errorf("package %s %s: no kernel in it", p.Name, p.Version)
	}
	return k, nil
}

func (k *kernel) has(option string) bool {
	return strings.Contains(k.config, "\nCONFIG_"+option+"=y\n")
}

// unpack gets the kernel proper out of what a boot loader loads. x86: an ELF
// file, which QEMU boots through PVH without the time that unpacking takes in
// the guest; in a bzImage it is the "payload" (Documentation/arch/x86/boot.rst).
// arm64: QEMU loads the plain Image.
func unpack(ctx context.Context, vmlinuz []byte) ([]byte, error) {
	const (
		setupSectors  = 0x1f1
		magic         = 0x202
		payloadOffset = 0x248
		payloadLength = 0x24c
		sector        = 512
	)
	if bytes.HasPrefix(vmlinuz, []byte(elf.ELFMAG)) {
		return compactELF(vmlinuz)
	}
	if len(vmlinuz) < sector*2 || string(vmlinuz[magic:magic+4]) != "HdrS" {
		return decompress(ctx, vmlinuz)
	}
	start := (int(vmlinuz[setupSectors])+1)*sector + int(binary.LittleEndian.Uint32(vmlinuz[payloadOffset:]))
	end := start + int(binary.LittleEndian.Uint32(vmlinuz[payloadLength:]))
	if end > len(vmlinuz) {
		return nil, errors.New("payload ends beyond the file")
	}
	vmlinux, err := decompress(ctx, vmlinuz[start:end])
	if err != nil {
		return nil, err
	}
	return compactELF(vmlinux)
}

// decompress unpacks by the magic number. Data that has none is as it should be.
func decompress(ctx context.Context, b []byte) ([]byte, error) {
	for _, f := range []struct{ magic, program string }{
		{"\x28\xb5\x2f\xfd", "zstd"},
		{"\x02\x21\x4c\x18", "lz4"},
		{"\xfd7zXZ\x00", "xz"},
	} {
		if bytes.HasPrefix(b, []byte(f.magic)) {
			return filter(ctx, b, f.program, "-dc")
		}
	}
	if !bytes.HasPrefix(b, []byte("\x1f\x8b")) {
		return b, nil
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// filter runs a decompressor. The kernel build appends the unpacked size to
// the data, about which they complain although all is there: what counts is
// that there was output.
func filter(ctx context.Context, b []byte, program string, args ...string) ([]byte, error) {
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(b), &out, &stderr
	if err := cmd.Run(); err != nil && out.Len() == 0 {
		return nil, fmt.Errorf("%s: %w: %s", program, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out.Bytes(), nil
}
