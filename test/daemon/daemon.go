// Package daemon runs a containerd of its own: its root, state, socket and
// configuration lie in one directory, and a containerd that runs on the
// machine already is not touched. Tests, demo and bench use it.
//
// Life: Start, Ctr as often as wanted, Restart, Stop. The Daemon owns its
// process; what it leaves after Stop is in the directory, which is the caller's.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Config is what Start needs.
type Config struct {
	// Bin has containerd and ctr in it, and is in their PATH.
	Bin string
	// Dir takes everything the daemon writes. Sockets lie in it: keep it short.
	Dir string
	// ShimDir has containerd-shim-vm-v2 in it, and comes first in PATH.
	ShimDir string
	// Env is added to the environment of containerd, and so of the shims.
	Env []string
	// CRI has the CRI plugin run. Nil: it is off, because it takes time to start.
	CRI *CRI
}

// A Daemon is a running containerd.
type Daemon struct {
	cfg     Config
	Version string // "1.7.35"
	cmd     *exec.Cmd
	exited  chan struct{} // closed when cmd was reaped
}

// Start runs containerd and returns when it answers.
func Start(ctx context.Context, cfg Config) (*Daemon, error) {
	d := &Daemon{cfg: cfg}
	out, err := exec.CommandContext(ctx, d.binary("containerd"), "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("ask containerd for its version: %w", err)
	}
	// containerd github.com/containerd/containerd v1.7.35 <revision>; Debian: 1.6.20~ds1 1.6.20~ds1-1+deb12u3
	fields := strings.Fields(string(out))
	if len(fields) < 3 {
		return nil, fmt.Errorf("containerd says of its version %q", out)
	}
	d.Version, _, _ = strings.Cut(strings.TrimPrefix(fields[2], "v"), "~")
	if cfg.CRI != nil {
		if err := cfg.CRI.write(d); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(d.path("containerd.toml"), d.config(), 0o600); err != nil {
		return nil, err
	}
	return d, d.Resume(ctx)
}

// config is the daemon's.
func (d *Daemon) config() []byte {
	version, off := 3, "'io.containerd.cri.v1.runtime', 'io.containerd.cri.v1.images', 'io.containerd.grpc.v1.cri'"
	if strings.HasPrefix(d.Version, "1.") {
		version, off = 2, "'io.containerd.grpc.v1.cri'"
	}
	cri := ""
	if d.cfg.CRI != nil {
		off, cri = "", d.cfg.CRI.config(d)
	}
	return fmt.Appendf(nil, `version = %d
root = '%s'
state = '%s'
disabled_plugins = [%s]
[grpc]
  address = '%s'
[debug]
  level = 'info'
%s`, version, d.path("root"), d.path("state"), off, d.Address(), cri)
}

// Resume starts the daemon again after Stop.
func (d *Daemon) Resume(ctx context.Context) error {
	log, err := os.OpenFile(d.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	// Not CommandContext: the daemon's life is ended by Stop.
	d.cmd = exec.Command(d.binary("containerd"), "--config", d.path("containerd.toml")) //nolint:noctx // see above
	d.cmd.Env = d.environ()
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	d.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) { // joined by Stop
		_ = cmd.Wait()
		close(exited)
	}(d.cmd, d.exited)
	if err := d.await(ctx); err != nil {
		return errors.Join(err, d.Stop())
	}
	return nil
}

// await returns when the daemon serves. It says so to nobody but systemd, so
// that it has to be asked.
func (d *Daemon) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := d.Ctr(ctx, "version").Run()
		if err == nil && d.cfg.CRI != nil {
			err = d.Crictl(ctx, "version").Run()
		}
		if err == nil {
			return nil
		}
		select {
		case <-d.exited:
			return fmt.Errorf("containerd ended:\n%s", d.Tail(20))
		case <-ctx.Done():
			return fmt.Errorf("containerd does not answer: %w\n%s", err, d.Tail(20))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Import loads an image's archive.
func (d *Daemon) Import(ctx context.Context, archive string) error {
	out, err := d.Ctr(ctx, "images", "import", archive).CombinedOutput()
	if err != nil {
		return fmt.Errorf("import image: %w: %s", err, out)
	}
	return nil
}

// Ctr is containerd's own client, talking to this daemon.
func (d *Daemon) Ctr(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.binary("ctr"), append([]string{"--address", d.Address()}, args...)...)
	cmd.Env = d.environ()
	// A process that keeps the output open must not keep Wait from returning.
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Restart stops the daemon, whose containers stay, and starts it again.
func (d *Daemon) Restart(ctx context.Context) error {
	if err := d.Stop(); err != nil {
		return err
	}
	return d.Resume(ctx)
}

// Stop ends the daemon's process, not its containers.
func (d *Daemon) Stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.exited:
		return nil
	case <-time.After(20 * time.Second):
	}
	err := d.cmd.Process.Kill()
	<-d.exited
	return errors.Join(errors.New("containerd did not end within 20 s of SIGTERM"), err)
}

// Address is the socket of the daemon.
func (d *Daemon) Address() string { return d.path("c.sock") }

// Bundle is the directory of a container of ctr's default namespace.
func (d *Daemon) Bundle(id string) string {
	return d.path(filepath.Join("state", "io.containerd.runtime.v2.task", "default", id))
}

// Tail returns the last lines of the daemon's log; the shims write there too.
// What it says of its own start is left out.
func (d *Daemon) Tail(lines int) string {
	text, err := os.ReadFile(d.path("log"))
	if err != nil {
		return err.Error()
	}
	var all []string
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, "loading plugin") {
			all = append(all, line)
		}
	}
	return strings.Join(all[max(0, len(all)-lines):], "")
}

func (d *Daemon) path(name string) string   { return filepath.Join(d.cfg.Dir, name) }
func (d *Daemon) binary(name string) string { return filepath.Join(d.cfg.Bin, name) }

func (d *Daemon) environ() []string {
	return slices.Concat(os.Environ(), d.cfg.Env, []string{"PATH=" + d.cfg.ShimDir + ":" + d.cfg.Bin + ":" + os.Getenv("PATH")})
}
