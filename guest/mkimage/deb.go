package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"strings"
)

// readDeb reads the files and links of a package that want wants. Names have
// no leading slash, and say usr/ where Debian 12 does not yet.
func readDeb(ctx context.Context, deb string, want func(name string) bool) (_ tree, err error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	t, err := readTar(out, want)
	_, _ = io.Copy(io.Discard, out) // padding; Wait tells of real errors
	if werr := cmd.Wait(); werr != nil {
		err = errors.Join(werr, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", deb, err)
	}
	return t, nil
}

func readTar(r io.Reader, want func(name string) bool) (tree, error) {
	t := tree{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		name := merged(path.Clean(strings.TrimPrefix(h.Name, "./")))
		if !want(name) {
			continue
		}
		switch h.Typeflag {
		case tar.TypeReg:
			data, err := io.ReadAll(tr)
			if err != nil {
				return nil, err
			}
			t[name] = node{mode: modeFile | uint32(h.Mode&0o777), data: data}
		case tar.TypeSymlink:
			t[name] = node{mode: modeLink | 0o777, data: []byte(h.Linkname)}
		}
	}
}

// merged is where a file is when /bin, /sbin and /lib* are links into /usr.
func merged(name string) string {
	top, _, _ := strings.Cut(name, "/")
	switch top {
	case "bin", "sbin", "lib", "lib64":
		return "usr/" + name
	}
	return name
}
