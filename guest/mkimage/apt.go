package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// apt gets Debian packages as this machine's apt is set up, without installing
// them, into a directory that keeps them.
type apt struct{ dir string }

// A pkg is the newest version of a package that apt knows.
type pkg struct {
	Name, Version, Arch, SHA256 string
	File                        string // in the archive
	Depends                     []string
}

// find asks for several packages at once. Those that apt does not know are
// missing in the answer.
func (a apt) find(ctx context.Context, names ...string) (map[string]pkg, error) {
	cache := filepath.Join(a.dir, "apt")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	out, err := command(ctx, "apt-cache", append([]string{
		"show", "--no-all-versions",
		// Many machines are set up not to keep this: a second for each question.
		"-o", "Dir::Cache::pkgcache=" + filepath.Join(cache, "pkgcache.bin"), "-o", "Dir::Cache::srcpkgcache=",
		"--",
	}, names...)...)
	if err != nil && len(out) == 0 {
		return nil, fmt.Errorf("%w (apt-get update may help)", err)
	}
	found := map[string]pkg{}
	for stanza := range strings.SplitSeq(string(out), "\n\n") {
		if p := parseStanza(stanza); p.Name != "" {
			found[p.Name] = p
		}
	}
	return found, nil
}

// parseStanza reads the fields we want of what apt-cache show prints.
func parseStanza(s string) pkg {
	var p pkg
	for line := range strings.Lines(s) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch key {
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Architecture":
			p.Arch = value
		case "SHA256":
			p.SHA256 = value
		case "Filename":
			p.File = value
		case "Depends", "Pre-Depends":
			for d := range strings.SplitSeq(value, ",") {
				d, _, _ = strings.Cut(d, "|") // the first alternative
				if f := strings.Fields(d); len(f) > 0 {
					name, _, _ := strings.Cut(f[0], ":")
					p.Depends = append(p.Depends, name)
				}
			}
		}
	}
	return p
}

// fetch returns the path of the package's .deb, downloaded if need be.
func (a apt) fetch(ctx context.Context, p pkg) (string, error) {
	file := filepath.Join(a.dir, filepath.Base(p.File))
	if sum, err := hashFile(file); err == nil && sum == p.SHA256 {
		return file, nil
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(a.dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(a.dir, "get-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	cmd := exec.CommandContext(ctx, "apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", p.Name+"="+p.Version)
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("download %s %s: %w: %s", p.Name, p.Version, err, bytes.TrimSpace(out))
	}
	got, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(got) != 1 {
		return "", fmt.Errorf("download %s: %d files, want 1", p.Name, len(got))
	}
	if sum, err := hashFile(got[0]); err != nil || sum != p.SHA256 {
		return "", fmt.Errorf("download %s: has sha256 %q, want %q (%w)", p.Name, sum, p.SHA256, err)
	}
	return file, os.Rename(got[0], file)
}

func hashFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, bufio.NewReaderSize(f, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// command runs a program and returns its output; what it said on stderr is in
// the error.
func command(ctx context.Context, name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}
