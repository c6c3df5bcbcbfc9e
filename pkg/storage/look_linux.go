package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Look gathers the facts for a plan.
func Look(share string, c Container) (Facts, error) {
	f := Facts{Share: share, Modes: map[string]fs.FileMode{}, Setattr: setattr()}
	var sources []string
	if len(c.Rootfs) == 0 && c.Root != nil {
		sources = append(sources, absolute(c.Bundle, c.Root.Path))
	}
	for _, m := range c.Mounts {
		if source := absolute(c.Bundle, m.Source); isBind(m) && !kernelPath(source) {
			sources = append(sources, source)
		}
	}
	for _, source := range sources {
		info, err := os.Stat(source)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Facts{}, fmt.Errorf("look at mounts: %w", err)
		}
		f.Modes[source] = info.Mode()
	}
	return f, nil
}

// setattr asks the kernel with a call that changes nothing.
func setattr() bool { return unix.MountSetattr(-1, "", 0, &unix.MountAttr{}) == nil }
