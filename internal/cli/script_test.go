package cli

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"vmshim": func() { os.Exit(Main(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) },
	})
}

func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			config := filepath.Join(env.WorkDir, "vmshim.toml")
			env.Setenv("VMSHIM_CONFIG", config)
			return os.WriteFile(config, []byte("state_dir = '"+filepath.Join(env.WorkDir, "vm")+"'\n"), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"sandbox": writeSandbox, "answer": answerConsole},
	})
}

// writeSandbox is the script command 'sandbox DIR ID CONTAINER…': it writes
// the state of a sandbox whose shim is this process, so that it is alive.
func writeSandbox(ts *testscript.TestScript, _ bool, args []string) {
	began := time.Now().Add(-time.Hour)
	st := sandbox.State{
		Version: sandbox.StateVersion, ID: args[1], Namespace: "default", Ready: true, VCPUs: 1, MemoryMiB: 256,
		Shim:       startedNow(ts),
		Processes:  []hypervisor.Process{{Role: "qemu", PID: 4711, StartTime: 1}},
		Containers: map[string]sandbox.ContainerState{},
		Timeline: []sandbox.Phase{
			{Name: sandbox.PhaseShim, At: began},
			{Name: sandbox.PhaseMachine, At: began.Add(200 * time.Millisecond)},
			{Name: sandbox.PhaseAgent, At: began.Add(1200 * time.Millisecond)},
			{Name: sandbox.PhaseHost, At: began.Add(300 * time.Millisecond)}, // beside the boot
			{Name: sandbox.PhaseOutput, At: began.Add(2 * time.Second)},
		},
	}
	for _, id := range args[2:] {
		st.Containers[id] = sandbox.ContainerState{Bundle: "/b/" + id}
	}
	text, err := json.Marshal(st)
	ts.Check(err)
	dir := ts.MkAbs(filepath.Join("vm", args[0]))
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(os.WriteFile(filepath.Join(dir, "state.json"), text, 0o600))
}

// answerConsole is the script command 'answer DIR': it answers for the
// sandbox's console as its shim would.
func answerConsole(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("unix", ts.MkAbs(filepath.Join("vm", args[0], "con")))
	ts.Check(err)
	var served sync.WaitGroup
	served.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, `"line one\nline two"`)
			_ = conn.Close()
		}
	})
	ts.Defer(func() {
		_ = l.Close()
		served.Wait()
	})
}
