package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
)

// about is what a binary says of itself. Asking QEMU takes 50 ms, which every
// start of a machine would pay: the answers are kept in a file.
type about struct {
	Size    int64             `json:"size"`
	ModTime time.Time         `json:"mod_time"`
	Inode   uint64            `json:"inode"`
	Version string            `json:"version,omitempty"` // of QEMU
	Aliases map[string]string `json:"aliases,omitempty"` // machine types of QEMU: "q35" is "pc-q35-7.2"
	Dialect string            `json:"dialect,omitempty"` // of virtiofsd
}

// aboutOf is what tells a file from others.
func aboutOf(info os.FileInfo) about {
	a := about{Size: info.Size(), ModTime: info.ModTime()}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		a.Inode = stat.Ino
	}
	return a
}

func (a about) same(b about) bool {
	return a.Size == b.Size && a.ModTime.Equal(b.ModTime) && a.Inode == b.Inode
}

// A cache maps paths of binaries to what they said, for as long as they stay
// the same file. A file that can't be read is as good as none.
type cache struct {
	path    string // empty: nothing is kept
	entries map[string]about
	changed bool
}

const cacheName = "probe.json"

func openCache(dir string) *cache {
	c := &cache{entries: map[string]about{}}
	if dir == "" {
		return c
	}
	// A directory that others may write to would let them choose the answers.
	if info, err := os.Stat(dir); err == nil && !ours(info) {
		return c
	}
	c.path = filepath.Join(dir, cacheName)
	if text, err := os.ReadFile(c.path); err == nil {
		if json.Unmarshal(text, &c.entries) != nil || c.entries == nil {
			c.entries = map[string]about{}
		}
	}
	return c
}

func ours(info os.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(stat.Uid) == os.Geteuid() && info.Mode().Perm()&0o022 == 0
}

// save replaces the file. Whoever else does has asked the same binaries.
func (c *cache) save(ctx context.Context) {
	if c.path == "" || !c.changed {
		return
	}
	if err := c.write(); err != nil {
		log.G(ctx).WithError(err).Debug("keep what was learned of the host's binaries")
	}
}

func (c *cache) write() error {
	text, err := json.Marshal(c.entries)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(c.path), cacheName+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), c.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// ask answers from the cache, or asks the binary.
func (c *cache) ask(path string, question func(*about) error) (about, error) {
	info, err := os.Stat(path)
	if err != nil {
		return about{}, err
	}
	now := aboutOf(info)
	if then, ok := c.entries[path]; ok && then.same(now) {
		return then, nil
	}
	if err := question(&now); err != nil {
		return about{}, err
	}
	c.entries[path], c.changed = now, true
	return now, nil
}

func (c *cache) qemu(ctx context.Context, path string) (about, error) {
	return c.ask(path, func(a *about) (err error) {
		version, err := output(ctx, path, "--version")
		if err != nil {
			return err
		}
		if a.Version, err = parseVersion(version); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		machines, err := output(ctx, path, "-machine", "help")
		a.Aliases = parseAliases(machines)
		return err
	})
}

func (c *cache) virtiofsd(ctx context.Context, path string) (about, error) {
	return c.ask(path, func(a *about) error {
		help, err := output(ctx, path, "--help")
		if err != nil {
			return err
		}
		switch {
		case strings.Contains(help, "--shared-dir"):
			a.Dialect = DialectRust
		case strings.Contains(help, "-o source="):
			a.Dialect = DialectC
		default:
			return fmt.Errorf("%s: not a virtiofsd: %.200q", path, help)
		}
		return nil
	})
}

var versionLine = regexp.MustCompile(`(?m)^QEMU emulator version (\d+\.\d+\.\d+)`)

func parseVersion(text string) (string, error) {
	m := versionLine.FindStringSubmatch(text)
	if m == nil {
		return "", fmt.Errorf("not a QEMU: %.200q", text)
	}
	return m[1], nil
}

var aliasLine = regexp.MustCompile(`(?m)^(\S+) .*\(alias of (\S+)\)`)

func parseAliases(text string) map[string]string {
	aliases := map[string]string{}
	for _, m := range aliasLine.FindAllStringSubmatch(text, -1) {
		aliases[m[1]] = m[2]
	}
	return aliases
}

// askTimeout bounds a question to a binary; one that does not answer is not
// what it is taken for.
const askTimeout = 30 * time.Second

func output(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("%s %s: %w: %.200q", path, strings.Join(args, " "), err, errs.String())
	}
	return out.String(), nil
}
