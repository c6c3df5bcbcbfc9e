package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

// barWidth is how many characters the longest part of a start gets.
const barWidth = 40

// phaseTexts say what has been reached at the end of each phase.
var phaseTexts = map[string]string{
	sandbox.PhaseShim:      "the shim begins",
	sandbox.PhasePrepared:  "directory, state and control group are there",
	sandbox.PhaseTemplate:  "a template was made, for all of this kind",
	sandbox.PhaseMachine:   "QEMU runs, the guest's kernel boots",
	sandbox.PhaseAgent:     "the agent in the guest answers",
	sandbox.PhaseSandbox:   "the guest has the sandbox",
	sandbox.PhaseHost:      "mounts and task process on the host",
	sandbox.PhaseContainer: "the guest has the container",
	sandbox.PhaseStarted:   "the container's process runs",
	sandbox.PhaseOutput:    "the first output arrives",
}

func timeline(_ context.Context, c *call) error {
	e, err := c.one()
	if err != nil {
		return err
	}
	type step struct {
		Phase  string        `json:"phase"`
		At     time.Time     `json:"at"`
		Offset time.Duration `json:"offset_ns"`
	}
	phases := slices.Clone(e.State.Timeline)
	slices.SortStableFunc(phases, func(a, b sandbox.Phase) int { return a.At.Compare(b.At) })
	steps := []step{}
	for _, p := range phases {
		steps = append(steps, step{p.Name, p.At, p.At.Sub(phases[0].At)})
	}
	if c.json {
		return c.print(steps, nil)
	}
	for i, s := range steps {
		var bar string
		if total := steps[len(steps)-1].Offset; i > 0 && total > 0 {
			from := int(steps[i-1].Offset * barWidth / total)
			bar = strings.Repeat(" ", from) + strings.Repeat("=", max(1, int(s.Offset*barWidth/total)-from))
		}
		text := phaseTexts[s.Phase]
		if text == "" {
			text = s.Phase
		}
		line := fmt.Sprintf("%7d ms  %-46s %s", s.Offset.Milliseconds(), text, bar)
		fmt.Fprintln(c.stdout, strings.TrimRight(line, " "))
	}
	return nil
}
