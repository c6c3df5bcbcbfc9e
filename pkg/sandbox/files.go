package sandbox

import (
	"fmt"
	"os"
	"path"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/storage"
)

// A File is a small one that containers of a pod share.
type File struct {
	Destination string // in the container
	Content     []byte
}

// filePath is where the sandbox has a file.
func (s *Sandbox) filePath(i int) string { return s.path(fmt.Sprintf("file%d", i)) }

func (s *Sandbox) writeFiles() error {
	for i, f := range s.opts.Files {
		if err := os.WriteFile(s.filePath(i), f.Content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// addFiles adds the pod's files to the mounts of a container, and the pod's
// /dev/shm in place of one of its own. What was bound there stays.
func (s *Sandbox) addFiles(spec *specs.Spec) []specs.Mount {
	mounts := spec.Mounts
	if len(s.opts.Files) == 0 {
		return mounts
	}
	access := "rw"
	if spec.Root != nil && spec.Root.Readonly {
		access = "ro"
	}
	mounts = slices.DeleteFunc(slices.Clone(mounts), func(m specs.Mount) bool {
		return path.Clean(m.Destination) == "/dev/shm" && m.Type == "tmpfs"
	})
	add := func(destination, source, access string) {
		if !slices.ContainsFunc(mounts, func(m specs.Mount) bool { return path.Clean(m.Destination) == destination }) {
			mounts = append(mounts, specs.Mount{
				Type: "bind", Destination: destination, Source: source, Options: []string{"rbind", "rprivate", access},
			})
		}
	}
	for i, f := range s.opts.Files {
		add(f.Destination, s.filePath(i), access)
	}
	add("/dev/shm", storage.GuestShm, "rw")
	return mounts
}
