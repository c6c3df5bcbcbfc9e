package sandbox

import "time"

// The phases of a start, in their usual order. Another one is "shim": when the
// work for the sandbox began.
const (
	PhaseShim      = "shim"      // the shim's work began
	PhasePrepared  = "prepared"  // directory, state, share and control group are there
	PhaseTemplate  = "template"  // a template was made, by the first of its kind
	PhaseMachine   = "machine"   // QEMU answers and the guest is booting
	PhaseAgent     = "agent"     // the guest's agent serves
	PhaseSandbox   = "sandbox"   // the guest has the sandbox
	PhaseHost      = "host"      // the host's part of the first container: mounts, task, hooks
	PhaseContainer = "container" // the guest has the first container
	PhaseStarted   = "started"   // its first process runs
	PhaseOutput    = "output"    // the first output was read
)

// A Phase is a point of a sandbox's time line.
type Phase struct {
	Name string    `json:"name"`
	At   time.Time `json:"at"`
}
