package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

// The operator's command sees what the shim did.
func TestE2EOperator(tt *testing.T) {
	once(tt, func(t *test) {
		needMachine(t)
		var checked struct{ OK bool }
		t.vmshim(&checked, "check")
		if !checked.OK {
			t.Error("check says that something is missing")
		}
		id := t.id("")
		if r := t.try("", runArgs([]string{"--detach"}, id, "sh", "-c", "echo hello; sleep 1000")...); r.code != 0 {
			t.Fatalf("%+v", r)
		}
		var list []struct {
			Alive bool
			State sandbox.State
		}
		t.vmshim(&list, "list")
		if len(list) != 1 || !list[0].Alive || list[0].State.ID != id || list[0].State.MemoryMiB != 256 || len(list[0].State.Containers) != 1 {
			t.Errorf("list: %+v", list)
		}
		var steps []struct {
			Phase  string
			Offset time.Duration `json:"offset_ns"`
		}
		t.vmshim(&steps, "timeline", id)
		seen := map[string]bool{}
		for i, s := range steps {
			seen[s.Phase] = true
			if i > 0 && s.Offset < steps[i-1].Offset {
				t.Errorf("timeline goes back: %+v", steps)
			}
		}
		for _, phase := range []string{sandbox.PhaseShim, sandbox.PhaseMachine, sandbox.PhaseAgent, sandbox.PhaseSandbox, sandbox.PhaseContainer, sandbox.PhaseStarted} {
			if !seen[phase] {
				t.Errorf("timeline without %s: %+v", phase, steps)
			}
		}
		var lines []string
		t.vmshim(&lines, "console", id)

		t.ctr("task", "kill", "-s", "SIGKILL", id)
		t.eventually("the task is stopped", func() bool { return t.status(id) == "STOPPED" })
		t.deleteTask(id)
		t.eventually("the list is empty", func() bool {
			list = nil
			t.vmshim(&list, "list")
			return len(list) == 0
		})
	})
}

// vmshim runs the command with the shim's configuration and reads its JSON.
func (t *test) vmshim(answer any, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(t.local.ShimDir(), "vmshim"), append(args, "--json")...)
	cmd.Env = append(os.Environ(), "VMSHIM_CONFIG="+t.local.ShimConfig(), "PATH="+t.local.ShimDir()+":"+os.Getenv("PATH"))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("vmshim %q: %v: %s%s", args, err, out, stderr.String())
	}
	if err := json.Unmarshal(out, answer); err != nil {
		t.Fatalf("vmshim %q: %v: %s", args, err, out)
	}
}
