package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// inputsName is a file beside the image that says what the image was made of.
const inputsName = "inputs.txt"

// inputs lists everything that decides the image: this program, its options,
// the agent, the lists, and what apt knows. (Asking apt for the packages takes
// it seconds where it keeps no cache.)
func inputs(ctx context.Context, o options) ([]byte, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	fmt.Fprintln(&b, "kernel", o.arch, o.kernel)
	for _, file := range []struct{ what, path string }{
		{"mkimage", self},
		{"agent", o.agent},
		{"modules", filepath.Join(o.lists, "modules.txt")},
		{"tools", filepath.Join(o.lists, "tools.txt")},
	} {
		sum, err := hashFile(file.path)
		if err != nil {
			return nil, err
		}
		fmt.Fprintln(&b, file.what, sum)
	}
	lists, err := command(ctx, "apt-config", "shell", "dir", "Dir::State::lists/f")
	if err != nil {
		return nil, err
	}
	dir := string(bytes.Trim(bytes.TrimPrefix(bytes.TrimSpace(lists), []byte("dir=")), "'"))
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
			continue
		}
		if err != nil {
			return nil, err
		}
		fmt.Fprintln(&b, "apt", e.Name(), info.Size(), info.ModTime().UnixNano())
	}
	return b.Bytes(), nil
}

// isFresh says whether the image that is there was made of these inputs.
func isFresh(out string, inputs []byte) bool {
	for _, name := range images {
		if _, err := os.Stat(filepath.Join(out, name)); err != nil {
			return false
		}
	}
	old, err := os.ReadFile(filepath.Join(out, inputsName))
	return err == nil && bytes.Equal(old, inputs)
}
