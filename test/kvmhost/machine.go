package main

import (
	"cmp"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// scratch takes a file system in memory, in a mount namespace of this process.
const scratch = "/mnt"

// uidBase is what the machine's users are counted from, apart from those of
// machines that tests run directly.
const uidBase = 2100000000

// machine runs the machine. It is the first process of its namespaces: whatever
// it leaves, the kernel removes.
func machine(ctx context.Context, args []string) error {
	unix.CloseOnExec(filesFD) // QEMU and its helpers need it not
	files := gob.NewEncoder(os.NewFile(filesFD, "files"))
	o, err := parse(args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("not done after %v", o.timeout))
	defer cancel()
	work, err := newOrder(o)
	if err != nil {
		return err
	}
	shown := slices.Clone(work.Mounts)
	shown[0].Path = o.root
	dirs := append(slices.Clone(shown), mounted{"image", o.image})
	if o.vsock != "" {
		binary, err := filepath.EvalSymlinks(o.vsock)
		if err != nil {
			return err
		}
		dirs = append(dirs, mounted{"vsock", filepath.Dir(binary)})
		o.vsock = filepath.Join(scratch, "vsock", filepath.Base(binary))
	}
	o.image = filepath.Join(scratch, "image")
	if err := enter(o.emulator, dirs); err != nil {
		return err
	}
	var shares []hypervisor.Share
	for _, m := range shown {
		shares = append(shares, hypervisor.Share{Tag: m.Tag, Dir: filepath.Join(scratch, m.Tag)})
	}
	cfg, found, err := probe(ctx, o)
	if err != nil {
		return err
	}
	var params []string
	if found.Accelerator == qemu.TCG {
		params = clockParams()
		work.Env = append(work.Env, "VMSHIM_PATIENCE=4")
	}
	began := time.Now()
	vm, err := qemu.Start(ctx, hypervisor.Spec{
		Name: "kvmhost", Arch: runtime.GOARCH,
		VCPUs: o.cpus, MaxVCPUs: o.cpus, MemoryMiB: o.memory, MaxMemoryMiB: o.memory,
		Kernel: filepath.Join(o.image, "vmlinux"), Initrd: filepath.Join(o.image, "initrd.img"),
		KernelParams: params, Shares: shares,
	}, qemu.Options{Config: cfg, Host: found, Dir: filepath.Join(scratch, "vm")})
	if err != nil {
		return err
	}
	defer vm.Kill() //nolint:errcheck // it can't fail
	err = use(ctx, vm, work, files, func(about string) {
		fmt.Fprintf(os.Stderr, "kvmhost: %s; itself on %s, QEMU %s; up after %.1f s\n", about, found.Accelerator, found.Version, time.Since(began).Seconds())
	})
	if lost, ok := errors.AsType[*lostError](err); ok {
		lost.err = explain(vm, lost.err)
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", context.Cause(ctx), lost.err)
		}
		return errors.Join(err, files.Encode(frame{Lost: true}))
	}
	return err
}

// A lostError is about a machine that failed: not what was done with it.
type lostError struct{ err error }

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// use waits for the machine and converses with it.
func use(ctx context.Context, vm *qemu.VM, work order, files *gob.Encoder, up func(about string)) error {
	conn, err := reach(ctx, vm, silence)
	if err != nil {
		return &lostError{err}
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	return converse(conn, work, files, up)
}

// A booting machine is one that is on its way up.
type booting interface {
	Ready() <-chan struct{}
	Done() <-chan struct{}
	Dial(ctx context.Context, port uint32) (net.Conn, error)
}

// reach connects to the machine when it is up. It can hang on its way, also
// after its server has said that it is there.
func reach(ctx context.Context, vm booting, silence time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, silence, silent(silence))
	defer cancel()
	select {
	case <-vm.Ready():
		conn, err := vm.Dial(ctx, port)
		if err != nil {
			return nil, cmp.Or(context.Cause(ctx), err)
		}
		return conn, nil
	case <-vm.Done():
		return nil, errors.New("boot failed")
	case <-ctx.Done():
		return nil, fmt.Errorf("boot: %w", context.Cause(ctx))
	}
}

func silent(silence time.Duration) error {
	return fmt.Errorf("the machine has said nothing for %v", silence)
}

// explain adds what is known of a machine that was lost.
func explain(vm *qemu.VM, err error) error {
	select {
	case <-vm.Done():
		return fmt.Errorf("%w: %w", err, vm.Err())
	case <-time.After(time.Second): // a connection ends a moment before the machine does
		return fmt.Errorf("%w; console: %s", err, vm.Console())
	}
}

// probe decides what the machine runs on: KVM where it can be nested, and
// otherwise a processor that QEMU emulates together with its SVM.
func probe(ctx context.Context, o options) (qemu.Config, *qemu.Host, error) {
	cfg := qemu.Config{VhostDeviceVsock: o.vsock, VirtiofsdCache: "always", UIDBase: uidBase}
	if !nested() {
		cfg.Accelerator, cfg.CPU = qemu.TCG, "EPYC,+svm"
	}
	found, err := qemu.Probe(ctx, cfg)
	if err == nil && found.Accelerator == qemu.TCG && cfg.CPU == "" { // KVM was not usable after all
		cfg.CPU = "EPYC,+svm"
	}
	return cfg, found, err
}

// nested says whether guests of this machine's KVM can have KVM.
func nested() bool {
	for _, name := range []string{"kvm_intel", "kvm_amd"} {
		value, err := os.ReadFile("/sys/module/" + name + "/parameters/nested")
		if err == nil && strings.ContainsAny(string(value), "Y1") {
			return true
		}
	}
	return false
}

func newOrder(o options) (order, error) {
	dir, err := os.Getwd()
	if err != nil {
		return order{}, err
	}
	w := order{Args: o.args, Dir: dir, Env: environment(os.Environ()), Files: o.files(dir)}
	w.Mounts = []mounted{{"root", "/"}}
	paths := append([]string{checkout(dir)}, o.share...)
	if filepath.IsAbs(o.args[0]) && strings.HasPrefix(o.args[0], os.TempDir()) { // what go test has built
		paths = append(paths, filepath.Dir(o.args[0]))
	}
	slices.Sort(paths) // so that one can be below another
	for i, p := range slices.Compact(paths) {
		if p, err = filepath.Abs(p); err != nil {
			return w, err
		}
		w.Mounts = append(w.Mounts, mounted{fmt.Sprintf("share%d", i), p})
	}
	return w, nil
}

// environment is what the command gets of this process'.
func environment(all []string) (env []string) {
	for _, kv := range all {
		key, _, _ := strings.Cut(kv, "=")
		switch {
		case slices.Contains([]string{"HOME", "PATH", "LANG", "CI", "XDG_CACHE_HOME"}, key),
			strings.HasPrefix(key, "VMSHIM_"), strings.HasPrefix(key, "GO"):
			env = append(env, kv)
		}
	}
	return env
}

// checkout is the directory above that has a go.mod, or the directory itself.
func checkout(dir string) string {
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d
		}
	}
	return dir
}

// enter moves this process to the root file system of the emulator, whose
// programs it finds there. What the machine is to see is taken along: read-only
// mounts of the directories, each without what is mounted below it, in scratch by
// their tags.
func enter(emulator string, dirs []mounted) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	var open []*os.File // before something is mounted over them
	for _, m := range dirs {
		f, err := os.OpenFile(m.Path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		open = append(open, f)
	}
	if emulator != "/" {
		// Only a mount can be a root; this one has nothing but files, which stay.
		if err := unix.Mount(emulator, emulator, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", emulator, err)
		}
		if err := unix.Mount("", emulator, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", emulator, err)
		}
		if err := unix.Mount("/dev", filepath.Join(emulator, "dev"), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind /dev: %w", err)
		}
	}
	if err := unix.Mount("proc", filepath.Join(emulator, "proc"), "proc", 0, ""); err != nil { // of this pid namespace
		return fmt.Errorf("mount proc: %w", err)
	}
	at := filepath.Join(emulator, scratch)
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount %s: %w", at, err)
	}
	if err := os.Mkdir(filepath.Join(at, "vm"), 0o755); err != nil {
		return err
	}
	for i, m := range dirs {
		if err := bindReadOnly(open[i], filepath.Join(at, m.Tag)); err != nil {
			return fmt.Errorf("%s: %w", m.Path, err)
		}
	}
	if emulator == "/" {
		return nil
	}
	return pivot(emulator)
}

// pivot makes a directory the root, as pivot_root(2) has it. After a chroot
// virtiofsd could not make a root of its own.
func pivot(dir string) error {
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root to %s: %w", dir, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil { // the old one
		return fmt.Errorf("unmount: %w", err)
	}
	return unix.Chdir("/")
}

func bindReadOnly(dir *os.File, at string) error {
	if err := os.Mkdir(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make read-only: %w", err)
	}
	return nil
}

// converse gives the order and does what comes back, to the end.
func converse(conn net.Conn, work order, files *gob.Encoder, up func(about string)) error {
	if err := conn.SetWriteDeadline(time.Now().Add(silence)); err != nil {
		return err
	}
	if err := gob.NewEncoder(conn).Encode(work); err != nil {
		return &lostError{fmt.Errorf("give order: %w", err)}
	}
	return listen(conn, silence, files, up)
}

// listen does what comes, to the end or until nothing has come for so long.
func listen(conn net.Conn, silence time.Duration, files *gob.Encoder, up func(about string)) error {
	for in := gob.NewDecoder(conn); ; {
		if err := conn.SetReadDeadline(time.Now().Add(silence)); err != nil {
			return err
		}
		var f frame
		if err := in.Decode(&f); errors.Is(err, os.ErrDeadlineExceeded) {
			return &lostError{silent(silence)}
		} else if err != nil {
			return &lostError{fmt.Errorf("connection to the machine ended: %w", err)}
		}
		switch {
		case f.Done && f.Err != "":
			return errors.New(f.Err)
		case f.Done && f.Code != 0:
			return exitStatus(f.Code)
		case f.Done:
			return nil
		case f.Alive:
		case f.Host != "":
			up(f.Host)
		case f.File != "":
			if err := files.Encode(f); err != nil {
				return fmt.Errorf("pass on %s: %w", f.File, err)
			}
		case f.Stream == 1:
			_, _ = os.Stdout.Write(f.Data)
		default:
			_, _ = os.Stderr.Write(f.Data)
		}
	}
}

// storeAll writes the files whose pieces come, and says whether the machine was
// lost.
func storeAll(from io.Reader, patterns []string) (lost bool, err error) {
	files := map[string]bool{}
	for in := gob.NewDecoder(from); ; {
		var f frame
		if err := in.Decode(&f); errors.Is(err, io.EOF) {
			return lost, nil
		} else if err != nil {
			return lost, fmt.Errorf("read files: %w", err)
		}
		if f.Lost {
			lost = true
			continue
		}
		if err := store(f, patterns, !files[f.File]); err != nil {
			return lost, err
		}
		files[f.File] = true
	}
}

// store writes a piece of a file that was asked for.
func store(f frame, patterns []string, first bool) error {
	if !slices.ContainsFunc(patterns, func(p string) bool { ok, _ := path.Match(p, f.File); return ok }) {
		return fmt.Errorf("%s was not asked for", f.File)
	}
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	if first {
		if err := os.MkdirAll(filepath.Dir(f.File), 0o755); err != nil {
			return err
		}
		flags |= os.O_TRUNC
	}
	to, err := os.OpenFile(f.File, flags, f.Mode.Perm())
	if err != nil {
		return err
	}
	_, err = to.Write(f.Data)
	return errors.Join(err, to.Close())
}
