package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// The directory of templates. Whoever makes one holds its lock; who goes on from
// one needs none.

// What Config.MakeTemplates can be.
const (
	MakeEmulated = "emulated"
	MakeAlways   = "always"
	MakeNever    = "never"
)

const (
	// maxTemplates is how many there are at most, of some 100 MiB each: those of
	// four configurations.
	maxTemplates = 8
	// retryAfter is when one that could not be made is tried again.
	retryAfter = time.Hour

	newPrefix    = ".new"    // of a template that is being written
	failedSuffix = ".failed" // of the file that says why there is none
)

// What is in the directory by other names belongs to somebody else.
var (
	templateName = regexp.MustCompile(`^[0-9a-f]{16}$`)
	failedName   = regexp.MustCompile(`^[0-9a-f]{16}\` + failedSuffix + `$`)
	newName      = regexp.MustCompile(`^\` + newPrefix + `[0-9]+$`)
)

var errTemplateBusy = fmt.Errorf("another process makes one: %w", errdefs.ErrUnavailable)

// EnsureTemplate makes the template that such a machine goes on from, where Config
// wants one to be made and there is none yet, and says whether it did. It does not
// try while another process makes one, nor for an hour after it was tried: the
// machine boots then.
func EnsureTemplate(ctx context.Context, spec hypervisor.Spec, opts Options) (made bool, err error) {
	if !opts.Config.MakesTemplates(*opts.Host) {
		return false, nil
	}
	path, err := opts.Config.templateFile(spec, *opts.Host)
	if path == "" || err != nil {
		return false, err
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if info, err := os.Stat(path + failedSuffix); err == nil && time.Since(info.ModTime()) < retryAfter {
		return false, nil
	}
	_, err = MakeTemplate(ctx, spec, opts)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, errTemplateBusy):
		return false, nil
	case errors.Is(ctx.Err(), context.Canceled): // it says nothing about the machine
		return false, err
	}
	why := strings.ReplaceAll(err.Error(), "\n", "; ")
	return false, errors.Join(err, os.WriteFile(path+failedSuffix, []byte(why+"\n"), 0o600))
}

// MakesTemplates says whether EnsureTemplate makes any on that host.
func (c Config) MakesTemplates(host Host) bool {
	return c.TemplateDir != "" && (c.MakeTemplates == MakeAlways || c.MakeTemplates == MakeEmulated && host.Accelerator == TCG)
}

// lockTemplates makes the directory and takes its lock, which ends with the file
// that it returns, or with the process.
func lockTemplates(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errTemplateBusy
		}
		return nil, &os.PathError{Op: "lock", Path: dir, Err: err}
	}
	return f, nil
}

// tidyTemplates removes, for one who has the lock, what others that made templates
// have left unfinished, and what is too much: templates that were not used for the
// longest, and reasons that nobody asks for any more. It leaves room for one.
func tidyTemplates(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var templates, gone []fs.FileInfo
	for _, e := range entries {
		info, err := e.Info()
		switch {
		case err != nil:
			return err
		case templateName.MatchString(e.Name()):
			templates = append(templates, info)
		case newName.MatchString(e.Name()), failedName.MatchString(e.Name()) && time.Since(info.ModTime()) > retryAfter:
			gone = append(gone, info)
		}
	}
	slices.SortFunc(templates, func(a, b fs.FileInfo) int { return lastUse(b).Compare(lastUse(a)) })
	gone = append(gone, templates[min(len(templates), maxTemplates-1):]...)
	var errs []error
	for _, info := range gone {
		errs = append(errs, os.Remove(filepath.Join(dir, info.Name())))
	}
	return errors.Join(errs...)
}

// RemoveTemplates removes all but those files from the directory, and the reasons
// for which there are no others.
func RemoveTemplates(dir string, but ...string) error {
	lock, err := lockTemplates(dir)
	if err != nil {
		return fmt.Errorf("remove templates: %w", err)
	}
	defer lock.Close()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("remove templates: %w", err)
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if failedName.MatchString(e.Name()) || templateName.MatchString(e.Name()) && !slices.Contains(but, path) {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(errs...)
}

// markUsed has a template stay longer than those that are not used. Where it can't
// be noted, templates go in the order in which they were made.
func markUsed(path string) { _ = os.Chtimes(path, time.Now(), time.Time{}) }

func lastUse(info fs.FileInfo) time.Time {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return time.Unix(st.Atim.Unix())
	}
	return info.ModTime()
}

// A Template is the file of one, for a list.
type Template struct {
	Path   string
	Size   int64 // that it takes, in bytes
	Made   time.Time
	Failed string // why there is none, when it was tried
}

// FindTemplate looks for the template of such a machine; its Path is empty when
// there is none.
func FindTemplate(spec hypervisor.Spec, cfg Config, host Host) (Template, error) {
	path, err := cfg.templateFile(spec, host)
	if path == "" || err != nil {
		return Template{}, err
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		why, err := os.ReadFile(path + failedSuffix)
		if errors.Is(err, fs.ErrNotExist) {
			return Template{}, nil
		}
		return Template{Failed: cmp.Or(strings.TrimSpace(string(why)), "for an unknown reason")}, err
	}
	if err != nil {
		return Template{}, err
	}
	size := info.Size()
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		size = st.Blocks * 512 // without its holes
	}
	return Template{Path: path, Size: size, Made: info.ModTime()}, nil
}
