package main

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/guest/boot"
	"github.com/vmshim/vmshim/internal/guest/module"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// serve takes the one order and carries it out. The machine powers off when it
// returns.
func serve(ctx context.Context) error {
	l, err := vsock.ListenGuest(port)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := boot.PushReady(ctx); err != nil {
		return err
	}
	conn, err := l.Accept()
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	defer conn.Close()
	var work order
	if err := gob.NewDecoder(conn).Decode(&work); err != nil {
		return fmt.Errorf("read order: %w", err)
	}
	out := newSender(conn)
	last := frame{Done: true}
	if last.Code, err = carryOut(ctx, work, out); err != nil {
		last.Err = err.Error()
	}
	if err := out.send(last); err != nil {
		return fmt.Errorf("send result: %w", err)
	}
	_, _ = conn.Read(make([]byte, 1)) // until the host has read it, and left
	return nil
}

func carryOut(ctx context.Context, work order, out *sender) (code int, err error) {
	if err := loadModules(); err != nil {
		return 0, err
	}
	if err := makeRoot(work.Mounts); err != nil {
		return 0, fmt.Errorf("make root: %w", err)
	}
	// What systemd gives to a service (DefaultLimitNOFILE).
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 10, Max: 1 << 19}); err != nil {
		return 0, fmt.Errorf("limit open files: %w", err)
	}
	group, err := makeGroup()
	if err != nil {
		return 0, fmt.Errorf("make control group: %w", err)
	}
	defer group.Close()
	if err := out.send(frame{Host: about()}); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var alive errgroup.Group
	alive.Go(func() error { return out.sayAlive(ctx, beat) })
	defer func() { cancel(); err = errors.Join(err, alive.Wait()) }()
	code, err = runCommand(ctx, work, group, out)
	if err != nil {
		return 0, err
	}
	for _, pattern := range work.Files {
		if err := sendFiles(pattern, out); err != nil {
			return code, fmt.Errorf("get %s: %w", pattern, err)
		}
	}
	return code, nil
}

// loadModules makes this a host of machines. A processor has one of the two.
func loadModules() error {
	l := module.New(module.Dir)
	if amd, intel := l.Load("kvm_amd", ""), l.Load("kvm_intel", ""); amd != nil && intel != nil {
		return errors.Join(amd, intel)
	}
	for _, name := range []string{"vhost_vsock", "vhost_net", "tun", "fuse", "loop", "br_netfilter", "xfrm_user"} {
		if err := l.Load(name, ""); err != nil {
			return err
		}
	}
	return nil
}

func runCommand(ctx context.Context, work order, group *os.File, out *sender) (int, error) {
	path := work.Args[0]
	if filepath.Base(path) == path { // looked for as the command's own environment says
		for _, kv := range work.Env {
			if value, ok := bytes.CutPrefix([]byte(kv), []byte("PATH=")); ok {
				if err := os.Setenv("PATH", string(value)); err != nil {
					return 0, err
				}
			}
		}
	}
	cmd := exec.CommandContext(ctx, path, work.Args[1:]...)
	cmd.Dir, cmd.Env = work.Dir, work.Env
	cmd.Stdout, cmd.Stderr = output{out, 1}, output{out, 2}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(group.Fd())}
	cmd.WaitDelay = drainTimeout
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay): // something it left holds its output
		return 0, nil
	case errors.As(err, &exit):
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return 128 + int(status.Signal()), nil // as shells say
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

func sendFiles(pattern string, out *sender) error {
	names, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := sendFile(name, out); err != nil {
			return err
		}
	}
	return nil
}

func sendFile(name string, out *sender) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", name)
	}
	if err := out.send(frame{File: name, Mode: info.Mode()}); err != nil {
		return err
	}
	_, err = io.Copy(piece{out, name, info.Mode()}, f)
	return err
}

// A piece sends what is written to it as a part of a file.
type piece struct {
	to   *sender
	name string
	mode fs.FileMode
}

func (p piece) Write(b []byte) (int, error) {
	if err := p.to.send(frame{File: p.name, Mode: p.mode, Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// about is one line on what this machine is.
func about() string {
	release, _ := os.ReadFile("/etc/debian_version")
	var name unix.Utsname
	_ = unix.Uname(&name) // can't fail
	return fmt.Sprintf("Debian %s, Linux %s", bytes.TrimSpace(release), unix.ByteSliceToString(name.Release[:]))
}
