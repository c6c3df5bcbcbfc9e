package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/test/daemon"
)

// shell does what a person does at a shell in a terminal of 33 by 121.
func shell(t *test, args ...string) {
	t.Helper()
	term, err := daemon.OpenTerminal(t.Ctr(t.Context(), args...), 33, 121)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			t.Logf("screen:\n%s", term.Screen())
		}
	}()
	enter := func(line string) {
		if err := term.Enter(line); err != nil {
			t.Error(err)
		}
	}
	sees := func(want string) {
		t.Helper()
		t.eventually("the terminal shows "+want, func() bool { return strings.Contains(term.Screen(), want) })
	}

	enter("echo a$((40+2))b")
	sees("a42b")
	enter("stty size")
	sees("33 121")
	if err := term.Resize(44, 99); err != nil {
		t.Error(err)
	}
	t.eventually("the new size is seen", func() bool {
		enter("stty size")
		return strings.Contains(term.Screen(), "44 99")
	})
	enter(`sh -c 'trap "echo caught$((1+1)); exit" INT; echo ready$((1+1)); while :; do sleep 0.1; done'`)
	sees("ready2")
	enter("\x03")
	sees("caught2")
	enter("exit 5")
	select {
	case <-term.Exited():
		t.equal("exit code", term.ExitCode(), 5)
	case <-time.After(vmtest.Within(15 * time.Second)):
		t.Error("the shell does not end")
	}
}

func TestE2ETerminal(tt *testing.T) {
	each(tt, func(t *test) { shell(t, runArgs([]string{"--rm", "--tty"}, t.id(""), "sh")...) })
}

func TestE2EExecTerminal(tt *testing.T) {
	once(tt, func(t *test) {
		id := t.spawn(nil, "sleep", "1000")
		shell(t, "task", "exec", "--tty", "--exec-id", "tty", id, "sh")
	})
}
