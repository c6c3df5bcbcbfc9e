package qemu

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// Templates. A template is a machine whose guest has booted and whose agent
// serves, written to a file. A machine that is the same in all that QEMU and the
// guest can see goes on from it instead of booting. What belongs to one machine
// alone can't be in it, nor can devices of vhost-user: vsock and shares come by
// hotplug while the machine stands still. What guests of one template have in
// common besides (the state of the random generator, the time) is for the owner
// to change before anything else.
//
// The file has the guest's memory, with holes where that is zero, and behind it
// what QEMU keeps of the machine. QEMU does not read the memory: it would touch
// all of it.

// templateFormat is raised with every change of what is in the file.
const templateFormat = 1

// templateFile is where the template of such a machine is, or would be. Empty:
// machines of this kind have none.
func (c Config) templateFile(spec hypervisor.Spec, host Host) (string, error) {
	if c.TemplateDir == "" || len(spec.Disks) > 0 {
		return "", nil
	}
	spec.Name, spec.Shares = "", nil
	key := struct {
		Format int
		Files  []about
		Args   []string
		Host   string
	}{Format: templateFormat, Args: arguments(spec, c, host, 0, descriptors{})}
	for _, path := range []string{host.QEMU, spec.Kernel, spec.Initrd} {
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		key.Files = append(key.Files, aboutOf(info))
	}
	if host.Accelerator == KVM { // the guest sees the host's processor, as its kernel presents it
		processor, err := processor()
		if err != nil {
			return "", err
		}
		key.Host = processor
	}
	text, err := json.Marshal(key)
	if err != nil {
		return "", err
	}
	return filepath.Join(c.TemplateDir, fmt.Sprintf("%x", sha256.Sum256(text))[:16]), nil
}

// processor is the host's kernel and the description of its first processor,
// without what changes by itself.
func processor() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	first, _, _ := bytes.Cut(text, []byte("\n\n"))
	about := []string{unix.ByteSliceToString(name.Release[:])}
	for line := range strings.Lines(string(first)) {
		if !strings.HasPrefix(line, "cpu MHz") && !strings.HasPrefix(line, "bogomips") {
			about = append(about, line)
		}
	}
	return strings.Join(about, ""), nil
}

var errOthers = fmt.Errorf("others than its owner can write to it: %w", errdefs.ErrPermissionDenied)

// openTemplate returns nil when the machine has to boot.
func (vm *VM) openTemplate() (*os.File, error) {
	path, err := vm.opts.Config.templateFile(vm.spec, *vm.opts.Host)
	if path == "" || err != nil || vm.opts.making {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, &TemplateError{path, err}
	}
	// Who can write to it owns the guest.
	if info, err := f.Stat(); err != nil || !ours(info) {
		f.Close()
		return nil, &TemplateError{path, cmp.Or(err, errOthers)}
	}
	markUsed(path)
	return f, nil
}

// Restored says that the guest went on from a template: its random generator is
// in the same state as that of others, and its time is that of long ago.
func (vm *VM) Restored() bool { return vm.restored }

// assemble gives a machine that stands still what is its own, after the state of
// the template if there is one, and lets it run.
func (vm *VM) assemble(ctx context.Context, template, back *os.File) error {
	if template != nil {
		if err := vm.migrate(ctx, "migrate-incoming", template); err != nil {
			return &TemplateError{template.Name(), vm.orGone(ctx, err)}
		}
		vm.restored = true
	}
	for _, share := range vm.spec.Shares {
		if _, err := vm.plugShare(ctx, share); err != nil {
			return fmt.Errorf("share %s: %w", share.Tag, vm.orGone(ctx, err))
		}
	}
	if err := vm.plugVsock(ctx, back); err != nil {
		return fmt.Errorf("vsock: %w", vm.orGone(ctx, err))
	}
	if err := vm.qmp.Execute(ctx, "cont", nil, nil); err != nil {
		return vm.orGone(ctx, err)
	}
	return nil
}

// A TemplateError is that of a template which can't be used: the machine could
// still boot.
type TemplateError struct {
	Path string
	Err  error
}

func (e *TemplateError) Error() string {
	return fmt.Sprintf("load template %s ('vmshim make-templates' makes it anew): %v", e.Path, e.Err)
}

// Unwrap gives the cause.
func (e *TemplateError) Unwrap() error { return e.Err }

// memorySize is that of a machine before it grows, in bytes.
func memorySize(spec hypervisor.Spec) int64 { return int64(spec.MemoryMiB) << 20 }

// makeMemory makes a guest's memory, empty.
func makeMemory(spec hypervisor.Spec) (*os.File, error) {
	fd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	if err := f.Truncate(memorySize(spec)); err != nil {
		f.Close()
		return nil, fmt.Errorf("make memory: %w", err)
	}
	return f, nil
}

// fill gives the machine the memory of the template.
func (vm *VM) fill(ctx context.Context, template *os.File) error {
	if err := copyMemory(ctx, vm.ram, template, memorySize(vm.spec)); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	return nil
}

// copyMemory copies the pages of the first bytes that are not zero.
func copyMemory(ctx context.Context, to, from *os.File, size int64) error {
	const piece = 1 << 20
	buf := make([]byte, piece)
	for at := int64(0); at < size; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		data, err := unix.Seek(int(from.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || data >= size {
			return nil // there are only holes
		}
		if err != nil {
			return fmt.Errorf("find data: %w", err)
		}
		n, err := from.ReadAt(buf[:min(piece, size-data)], data)
		if err != nil {
			return err
		}
		if err := writePages(to, buf[:n], data); err != nil {
			return err
		}
		at = data + int64(n)
	}
	return nil
}

// writePages writes the stretches of pages that are not zero.
func writePages(to *os.File, data []byte, at int64) error {
	const page = 4096
	zero := make([]byte, page)
	for from := 0; from < len(data); {
		end := from
		for end < len(data) && !bytes.Equal(data[end:min(end+page, len(data))], zero) {
			end += page
		}
		if end = min(end, len(data)); end > from {
			if _, err := to.WriteAt(data[from:end], at+int64(from)); err != nil {
				return err
			}
		}
		from = end + page
	}
	return nil
}

// migrate reads or writes the machine's state, and waits until that is done.
func (vm *VM) migrate(ctx context.Context, command string, file *os.File) error {
	err := vm.qmp.Execute(ctx, "migrate-set-capabilities", properties{
		"capabilities": []properties{
			{"capability": "events", "state": true},
			{"capability": "x-ignore-shared", "state": true},
		},
	}, nil)
	if err != nil {
		return err
	}
	if _, err := file.Seek(memorySize(vm.spec), io.SeekStart); err != nil {
		return err
	}
	const name = "template"
	if err := vm.qmp.GetFD(ctx, name, file); err != nil {
		return err
	}
	if err := vm.qmp.Execute(ctx, command, properties{"uri": "fd:" + name}, nil); err != nil {
		return err
	}
	select {
	case status := <-vm.migrated:
		if status == "completed" {
			return nil
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var info struct {
		Error string `json:"error-desc"`
	}
	if err := vm.qmp.Execute(ctx, "query-migrate", nil, &info); err != nil {
		return err
	}
	return fmt.Errorf("qemu: %.512q", info.Error)
}

const vsockID = "vsock"

// plugVsock adds the guest's vsock behind the bridge, where it can be removed.
func (vm *VM) plugVsock(ctx context.Context, back *os.File) error {
	_, err := vm.plug(ctx, hypervisor.Plugged{Kind: hypervisor.KindVsock, ID: vsockID}, busSlots, func(p *plug) []step {
		files := &lent{vm: vm}
		files.add(p.name(), back)
		if vm.cid == 0 {
			return []step{files.step(), vm.chardev(p, files), vm.pciDevice(p, "vhost-user-vsock-pci", properties{"chardev": p.backend()})}
		}
		device := vm.pciDevice(p, "vhost-vsock-pci", properties{"vhostfd": p.name(), "guest-cid": vm.cid})
		return []step{files.step(), files.takenBy(device)}
	})
	return err
}

// MakeTemplate boots a machine of that kind, without its shares, and writes the
// template that others like it go on from, in place of one that is there. It
// returns the file. Options.Dir is for the machine, of which nothing is left there.
// It fails with errdefs.ErrUnavailable while another process makes one.
func MakeTemplate(ctx context.Context, spec hypervisor.Spec, opts Options) (path string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make template: %w", err)
		}
	}()
	if err := opts.validate(spec); err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if path, err = opts.Config.templateFile(spec, *opts.Host); err != nil {
		return "", err
	}
	if path == "" {
		return "", fmt.Errorf("no directory for templates, or a machine with disks: %w", errdefs.ErrInvalidArgument)
	}
	lock, err := lockTemplates(opts.Config.TemplateDir)
	if err != nil {
		return "", err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	undo.Add(lock.Close)
	if err := tidyTemplates(opts.Config.TemplateDir); err != nil {
		return "", err
	}
	file, err := os.CreateTemp(opts.Config.TemplateDir, newPrefix)
	if err != nil {
		return "", err
	}
	undo.Add(remove(file.Name()))
	undo.Add(file.Close)
	spec.Shares, opts.making = nil, true
	vm, err := Start(ctx, spec, opts)
	if err != nil {
		return "", err
	}
	undo.Add(vm.Kill)
	if err := vm.freeze(ctx, file); err != nil {
		return "", errors.Join(err, vm.orReason(ctx))
	}
	// A hole that a crash leaves in it would be memory of the guest.
	if err := file.Sync(); err != nil {
		return "", err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return "", err
	}
	return path, remove(path + failedSuffix)()
}

// orReason is why a machine went down, if it did.
func (vm *VM) orReason(ctx context.Context) error {
	if !vm.isDown() {
		return nil
	}
	select {
	case <-vm.done:
		return vm.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// freeze waits until the agent serves, takes the vsock away, and writes the
// machine to the file.
func (vm *VM) freeze(ctx context.Context, file *os.File) error {
	ctx, end, err := vm.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := vm.awaitReady(ctx); err != nil {
		return fmt.Errorf("wait for the guest's agent: %w; console: %s", err, vm.Console())
	}
	if daemon := vm.process(roleVsock); daemon != nil {
		vm.setOptional(daemon, true) // it ends with its connection
	}
	if err := vm.unplug(ctx, vsockID, hypervisor.KindVsock); err != nil {
		return fmt.Errorf("take away vsock: %w", err)
	}
	if err := vm.qmp.Execute(ctx, "stop", nil, nil); err != nil {
		return err
	}
	if err := vm.migrate(ctx, "migrate", file); err != nil {
		return err
	}
	return copyMemory(ctx, file, vm.ram, memorySize(vm.spec))
}

// silence is how long an agent that takes connections may not say that it serves.
const silence = 5 * time.Second

var errSilent = errors.New("it takes connections, but does not say that it serves, as it would have to wherever it goes on")

// awaitReady waits until the agent says that it serves.
func (vm *VM) awaitReady(ctx context.Context) error {
	tick := time.NewTicker(vm.silence)
	defer tick.Stop()
	for answered := false; ; {
		select {
		case <-vm.Ready():
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			if answered {
				return errSilent
			}
			answered = vm.answers(ctx)
		}
	}
}

// answers says whether something in the guest takes connections for the agent.
func (vm *VM) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, vm.silence)
	defer cancel()
	conn, err := vm.dial(ctx, extension.AgentPort)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// process is the one that has the role; nil: none has.
func (vm *VM) process(role string) *process {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for _, p := range vm.processes {
		if p.Role == role {
			return p
		}
	}
	return nil
}
