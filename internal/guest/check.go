package guest

import (
	"path/filepath"
	"strings"
)

// Bounds of what a request may carry.
const (
	maxID      = 255 // a container's id names a directory and a control group
	maxStrings = 1 << 16
	maxSignal  = 64
)

// checkID accepts what can name a file, a control group and a container of
// libcontainer.
func checkID(what, id string) error {
	switch {
	case id == "":
		return invalid("%s is empty", what)
	case len(id) > maxID:
		return invalid("%s has %d bytes, at most %d", what, len(id), maxID)
	case id[0] == '.' || id[0] == '-':
		return invalid("%s %q begins with %q", what, id, id[0])
	}
	for _, r := range id {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-", r) {
			return invalid("%s %q has a %q", what, id, r)
		}
	}
	return nil
}

// checkPath accepts a clean absolute path without NUL bytes.
func checkPath(what, path string) error {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) || len(path) >= 4096 {
		return invalid("%s %q is not a clean absolute path", what, bound(path, 512))
	}
	return nil
}

// below returns path relative to dir, which must contain it and not be it.
func below(what, dir, path string) (string, error) {
	path = strings.TrimSuffix(path, "/") // Kata's own shim ends mount points with one
	if err := checkPath(what, path); err != nil {
		return "", err
	}
	rel, err := filepath.Rel(dir, path)
	if err != nil || rel == "." || !filepath.IsLocal(rel) {
		return "", invalid("%s %q is not below %s", what, path, dir)
	}
	return rel, nil
}
