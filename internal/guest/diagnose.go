package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// Kubernetes' words for what a container leaves behind.
const (
	terminationLog        = "termination_log"
	terminationPath       = "/dev/termination-log"
	terminationAnnotation = "io.kubernetes.container.terminationMessagePath"
)

// nameAnnotations are where a container's name in its pod is.
var nameAnnotations = []string{"io.kubernetes.cri.container-name", "io.kubernetes.container.name"}

// maxDiagnostics is how much of the end of a file is told. Kubernetes reads 4 KiB.
const maxDiagnostics = 64 << 10

// about is what the specification says of a container that is asked for later.
type about struct {
	names    []string // in its pod
	rootfs   string   // where the root file system is in the guest
	log      string   // path of the termination log in the container
	logMount string   // the file in the guest that is mounted there; "" is none
}

func newAbout(spec *protocol.Spec) about {
	a := about{rootfs: spec.GetRoot().GetPath(), log: terminationPath}
	for _, key := range nameAnnotations {
		if name := spec.GetAnnotations()[key]; name != "" {
			a.names = append(a.names, name)
		}
	}
	if path := spec.GetAnnotations()[terminationAnnotation]; path != "" {
		a.log = path
	}
	for _, m := range spec.GetMounts() {
		if m.GetDestination() == a.log {
			a.logMount = m.GetSource()
		}
	}
	return a
}

// GetDiagnosticData implements the protocol.
func (s *service) GetDiagnosticData(_ context.Context, req *protocol.GetDiagnosticDataRequest) (*protocol.GetDiagnosticDataResponse, error) {
	if kind := req.GetLogType(); kind != terminationLog {
		return nil, invalid("log of type %q", bound(kind, 64))
	}
	c, err := s.container(req)
	if err != nil {
		return nil, err
	}
	if c.current() == creating {
		return nil, precondition("container %q is %s", c.id, creating)
	}
	data, err := c.terminationLog()
	if err != nil {
		return nil, fmt.Errorf("termination log of container %q: %w", c.id, err)
	}
	return &protocol.GetDiagnosticDataResponse{Data: data}, nil
}

// terminationLog looks where the file may be: what the host has mounted there,
// in the running container, which has mounts of its own, or in its root file
// system.
func (c *container) terminationLog() ([]byte, error) {
	if root := c.sandbox.cfg.Root; c.about.logMount != "" {
		if rel, err := below("file", root, c.about.logMount); err == nil {
			return readTail(root, rel, unix.RESOLVE_NO_SYMLINKS)
		}
	}
	if p, err := c.process(""); err == nil && !p.ended() {
		b, err := readTail(fmt.Sprintf("/proc/%d/root", p.pid), c.about.log, 0)
		if err == nil {
			return b, nil
		}
	}
	return readTail(c.about.rootfs, c.about.log, 0)
}

// readTail reads the end of a file of a container.
func readTail(root, name string, resolve uint64) ([]byte, error) {
	f, err := openInRoot(root, strings.TrimLeft(name, "/"), resolve)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("%s", bound(name, 512))
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	from := max(0, info.Size()-maxDiagnostics)
	return io.ReadAll(io.NewSectionReader(f, from, maxDiagnostics))
}

// isCalled says whether a container of the pod is meant.
func (c *container) isCalled(name string) bool {
	return c.id == name || slices.Contains(c.about.names, name)
}
