package boot

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// As the agent, this binary does what its arguments say.
func TestMain(m *testing.M) {
	if os.Args[0] == "vmshim-agent" {
		os.Exit(fakeAgent(os.Args[1]))
	}
	os.Exit(m.Run())
}

func fakeAgent(act string) int {
	fmt.Println("agent says", act)
	switch act {
	case "orphan": // a child that outlives its parent, and is not ours
		if err := exec.Command("/bin/sh", "-c", "sleep 0.05 & sleep 0.2 &").Run(); err != nil {
			return 1
		}
		time.Sleep(100 * time.Millisecond)
	case "fail":
		fmt.Fprintln(os.Stderr, "panic: at the disco")
		return 2
	case "die":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}
	return 0
}

func TestStartAndReap(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ act, err, output string }{
		{act: "well"},
		{act: "orphan"},
		{act: "fail", err: "agent exited with status 2", output: "panic: at the disco\n"},
		{act: "die", err: "agent ended by signal: killed"},
	} {
		t.Run(tt.act, func(t *testing.T) {
			var got bytes.Buffer
			out := newConsole(&got)
			agent, err := start(out, []string{tt.act}, false)
			if err != nil {
				t.Fatal(err)
			}
			err = agent.reap()
			if fmt.Sprint(err) != tt.err && (err != nil || tt.err != "") {
				t.Errorf("reap = %v, want %v", err, tt.err)
			}
			out.Flush(time.Minute)
			if want := "agent says " + tt.act + "\n" + tt.output; !strings.HasPrefix(got.String(), want) {
				t.Errorf("console got %q, want %q", got.String(), want)
			}
		})
	}
}
