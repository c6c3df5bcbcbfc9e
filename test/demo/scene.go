package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmshim/vmshim/test/daemon"
	"github.com/vmshim/vmshim/test/ociimage"
)

// A scene is the container that everything is shown with.
type scene struct {
	*daemon.Daemon
	local *daemon.Local
	id    string
	main  *exec.Cmd     // 'ctr run', in the foreground
	ended chan struct{} // closed when main was reaped
}

func (s *scene) play(ctx context.Context) error {
	for _, step := range []struct {
		title string
		do    func(context.Context) error
	}{
		{"A container in a machine: host and guest", s.start},
		{"How it started", s.timeline},
		{"A process more, with input from here", s.exec},
		{"A terminal, 28 rows by 97 columns", s.terminal},
		{"A directory of the host, written on one side and read on the other", s.mount},
		{"What containerd and vmshim say of it", s.list},
		{"Kill and delete", s.kill},
	} {
		title(step.title)
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", strings.ToLower(step.title), err)
		}
	}
	return nil
}

func (s *scene) start(ctx context.Context) error {
	if err := os.Mkdir(s.share(), 0o755); err != nil {
		return err
	}
	const script = "uname -a; grep -E \"MemTotal|MemAvailable\" /proc/meminfo"
	host, err := exec.CommandContext(ctx, ociimage.Busybox, "sh", "-c", script).Output()
	if err != nil {
		return err
	}
	fmt.Printf("host:\n%s", indent(string(host)))

	args := []string{
		"run", "--rm", "--runtime", "io.containerd.vm.v2",
		"--mount", "type=bind,src=" + s.share() + ",dst=/shared,options=rbind:rw",
		ociimage.Name, s.id, "sh", "-c", script + "; echo ready; exec sleep 1000",
	}
	command("ctr", args)
	s.main = s.Ctr(context.WithoutCancel(ctx), args...) // ended by clear
	out, err := s.main.StdoutPipe()
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	s.main.Stderr = &stderr
	if err := s.main.Start(); err != nil {
		return err
	}
	var guest strings.Builder
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "ready" {
		fmt.Fprintln(&guest, lines.Text())
	}
	s.ended = make(chan struct{})
	go func() { // joined by clear
		_ = s.main.Wait() // its exit code is looked at
		close(s.ended)
	}()
	fmt.Printf("guest:\n%s", indent(guest.String()))
	if lines.Text() != "ready" {
		return fmt.Errorf("the container ended: %s", stderr.String())
	}
	if hostName, guestName := strings.Fields(string(host)), strings.Fields(guest.String()); hostName[2] == guestName[2] {
		return fmt.Errorf("host and guest have the same kernel %s", hostName[2])
	}
	return nil
}

func (s *scene) timeline(ctx context.Context) error {
	return show(vmshim(ctx, s.local, "timeline", s.id))
}

func (s *scene) exec(ctx context.Context) error {
	out, err := s.ctr(ctx, "hello from the host\n", "task", "exec", "--exec-id", "upper", s.id, "tr", "a-z", "A-Z")
	return errors.Join(err, expect(out, "HELLO FROM THE HOST\n"))
}

func (s *scene) terminal(ctx context.Context) error {
	// ctr tells the size when the process runs already.
	const script = "tty; while [ -z \"$(stty size 2>/dev/null)\" ]; do sleep 0.1; done; stty size"
	args := []string{"task", "exec", "--tty", "--exec-id", "tty", s.id, "sh", "-c", script}
	command("ctr", args)
	t, err := daemon.OpenTerminal(s.Ctr(ctx, args...), 28, 97)
	if err != nil {
		return err
	}
	<-t.Exited() // ctx ends it at the latest
	fmt.Print(indent(t.Screen()))
	return expect(t.Screen(), "/dev/pts/", "28 97")
}

func (s *scene) mount(ctx context.Context) error {
	if err := os.WriteFile(filepath.Join(s.share(), "a"), []byte("written on the host\n"), 0o600); err != nil {
		return err
	}
	out, err := s.ctr(ctx, "", "task", "exec", "--exec-id", "share", s.id, "sh", "-c", "cat /shared/a; echo written in the guest > /shared/b")
	if err := errors.Join(err, expect(out, "written on the host\n")); err != nil {
		return err
	}
	fmt.Printf("$ cat %s/b\n", s.share())
	text, err := os.ReadFile(filepath.Join(s.share(), "b"))
	fmt.Print(indent(string(text)))
	return errors.Join(err, expect(string(text), "written in the guest\n"))
}

func (s *scene) list(ctx context.Context) error {
	for _, args := range [][]string{{"task", "ls"}, {"task", "ps", s.id}} {
		out, err := s.ctr(ctx, "", args...)
		if err := errors.Join(err, expect(out, "PID")); err != nil {
			return err
		}
	}
	return show(vmshim(ctx, s.local, "list"))
}

func (s *scene) kill(ctx context.Context) error {
	if _, err := s.ctr(ctx, "", "task", "kill", "--signal", "SIGKILL", s.id); err != nil {
		return err
	}
	select {
	case <-s.ended: // with an error, the exit code; it removes the container itself: --rm
	case <-ctx.Done():
		return fmt.Errorf("'ctr run' does not end: %w", ctx.Err())
	}
	if code := s.main.ProcessState.ExitCode(); code != 137 {
		return fmt.Errorf("exit code %d, want 137: killed", code)
	}
	fmt.Println("  'ctr run' ended with 137: killed by signal 9")
	return nil
}

// clear ends what play started, and looks for what is left.
func (s *scene) clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if s.ended != nil {
		_ = s.Ctr(ctx, "task", "kill", "--signal", "SIGKILL", s.id).Run()
		select {
		case <-s.ended:
		case <-ctx.Done():
			_ = s.main.Process.Kill()
			<-s.ended
		}
	}
	left, err := s.Leftovers(s.local.StateDir(), s.id)
	for tick := time.Tick(50 * time.Millisecond); err == nil && len(left) > 0 && ctx.Err() == nil; <-tick {
		left, err = s.Leftovers(s.local.StateDir(), s.id)
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left on the host:\n%s", strings.Join(left, "\n")))
	}
	return errors.Join(err, s.Stop())
}

// ctr runs ctr and shows it.
func (s *scene) ctr(ctx context.Context, stdin string, args ...string) (string, error) {
	command("ctr", args)
	cmd := s.Ctr(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	fmt.Print(indent(string(out)))
	if err != nil {
		return string(out), fmt.Errorf("%w: %s", err, stderr.String())
	}
	return string(out), nil
}

// vmshim is the operator's command, with the demo's configuration.
func vmshim(ctx context.Context, local *daemon.Local, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(local.ShimDir(), "vmshim"), args...)
	cmd.Env = append(os.Environ(), "VMSHIM_CONFIG="+local.ShimConfig(), "PATH="+local.ShimDir()+":"+os.Getenv("PATH"))
	return cmd
}

func show(cmd *exec.Cmd) error {
	command("vmshim", cmd.Args[1:])
	out, err := cmd.CombinedOutput()
	fmt.Print(indent(string(out)))
	return err
}

// command shows a command line as a shell takes it.
func command(name string, args []string) {
	fmt.Print("$ ", name)
	for _, arg := range args {
		if strings.ContainsAny(arg, " ;|<>$") {
			arg = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
		fmt.Print(" ", arg)
	}
	fmt.Println()
}

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimRight(text, "\n")) {
		b.WriteString("  " + strings.TrimRight(line, "\r\n") + "\n")
	}
	return b.String()
}
