package cli

import (
	"bytes"
	"os"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// startedNow names this process as a state file does: by pid and start time,
// field 22 of proc_pid_stat(5).
func startedNow(ts *testscript.TestScript) hypervisor.Process {
	stat, err := os.ReadFile("/proc/self/stat")
	ts.Check(err)
	start, err := strconv.ParseUint(string(bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])[19]), 10, 64)
	ts.Check(err)
	return hypervisor.Process{Role: "shim", PID: os.Getpid(), StartTime: start}
}
