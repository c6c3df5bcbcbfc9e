package e2e

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
)

// A terminal is ctr on a pty, with a person (the test) at the other end.
type terminal struct {
	t      *test
	master console.Console
	done   chan int

	mu     sync.Mutex
	screen bytes.Buffer // guarded by mu
}

func openTerminal(t *test, rows, columns uint16, args ...string) *terminal {
	t.Helper()
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	if err := master.Resize(console.WinSize{Height: rows, Width: columns}); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	cmd := t.Ctr(t.Context(), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &terminal{t: t, master: master, done: make(chan int, 1)}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for buf := make([]byte, 4096); ; {
			n, err := master.Read(buf)
			p.mu.Lock()
			p.screen.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return // EIO: the last user of the slave is gone
			}
		}
	}()
	go func() {
		_ = cmd.Wait()
		<-read
		_ = master.Close()
		p.done <- cmd.ProcessState.ExitCode()
	}()
	return p
}

func (p *terminal) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.screen.String()
}

func (p *terminal) enter(line string) {
	if _, err := fmt.Fprintf(p.master, "%s\n", line); err != nil {
		p.t.Error(err)
	}
}

func (p *terminal) sees(want string) {
	p.t.Helper()
	p.t.eventually("the terminal shows "+want, func() bool { return strings.Contains(p.text(), want) })
}

// session is what a person does at the shell of a terminal.
func (p *terminal) session() {
	p.t.Helper()
	p.enter("echo a$((40+2))b")
	p.sees("a42b")
	p.enter("stty size")
	p.sees("33 121")
	if err := p.master.Resize(console.WinSize{Height: 44, Width: 99}); err != nil {
		p.t.Error(err)
	}
	p.t.eventually("the new size is seen", func() bool {
		p.enter("stty size")
		return strings.Contains(p.text(), "44 99")
	})
	p.enter(`sh -c 'trap "echo caught$((1+1)); exit" INT; echo ready$((1+1)); while :; do sleep 0.1; done'`)
	p.sees("ready2")
	p.enter("\x03")
	p.sees("caught2")
	p.enter("exit 5")
	select {
	case code := <-p.done:
		p.t.equal("exit code", code, 5)
	case <-time.After(15 * time.Second):
		p.t.Error("the shell does not end")
	}
	if p.t.Failed() {
		p.t.Logf("screen:\n%s", p.text())
	}
}

func TestE2ETerminal(tt *testing.T) {
	each(tt, func(t *test) {
		openTerminal(t, 33, 121, runArgs([]string{"--rm", "--tty"}, t.id(""), "sh")...).session()
	})
}

func TestE2EExecTerminal(tt *testing.T) {
	each(tt, func(t *test) {
		id := t.spawn(nil, "sleep", "1000")
		openTerminal(t, 33, 121, "task", "exec", "--tty", "--exec-id", "tty", id, "sh").session()
	})
}
