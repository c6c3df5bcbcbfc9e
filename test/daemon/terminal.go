package daemon

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"github.com/containerd/console"
)

// A Terminal is a command on a pty, with the caller in the place of a person.
type Terminal struct {
	master console.Console
	exited chan struct{} // closed when the command was reaped and its output read
	cmd    *exec.Cmd

	mu     sync.Mutex
	screen bytes.Buffer // guarded by mu
}

// OpenTerminal starts cmd on a terminal of the given size.
func OpenTerminal(cmd *exec.Cmd, rows, columns uint16) (_ *Terminal, err error) {
	master, path, err := console.NewPty()
	if err != nil {
		return nil, err
	}
	t := &Terminal{master: master, exited: make(chan struct{}), cmd: cmd}
	defer func() {
		if err != nil {
			_ = master.Close()
		}
	}()
	if err := t.Resize(rows, columns); err != nil {
		return nil, err
	}
	slave, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer slave.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	read := make(chan struct{})
	go func() { // ends with the last user of the slave; joined by the next
		defer close(read)
		t.read()
	}()
	go func() { // joined by Wait
		_ = cmd.Wait()
		<-read
		_ = master.Close()
		close(t.exited)
	}()
	return t, nil
}

func (t *Terminal) read() {
	for buf := make([]byte, 4096); ; {
		n, err := t.master.Read(buf)
		t.mu.Lock()
		t.screen.Write(buf[:n])
		t.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Resize changes the size, which the command is told.
func (t *Terminal) Resize(rows, columns uint16) error {
	return t.master.Resize(console.WinSize{Height: rows, Width: columns})
}

// Enter types a line.
func (t *Terminal) Enter(line string) error {
	_, err := fmt.Fprintf(t.master, "%s\n", line)
	return err
}

// Screen is everything that was shown.
func (t *Terminal) Screen() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.screen.String()
}

// Exited is closed when the command has ended.
func (t *Terminal) Exited() <-chan struct{} { return t.exited }

// ExitCode is valid after Exited.
func (t *Terminal) ExitCode() int { return t.cmd.ProcessState.ExitCode() }
