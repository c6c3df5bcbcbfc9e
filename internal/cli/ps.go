package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/vmshim/vmshim/pkg/agent"
)

// psTimeout bounds what the guest may take.
const psTimeout = 10 * time.Second

// A processRow is a process in a guest.
type processRow struct {
	Container string `json:"container"`
	PID       uint32 `json:"pid"` // in the guest
	Parent    uint32 `json:"parent"`
	UID       uint32 `json:"uid"`
	Exec      string `json:"exec,omitempty"`
	Command   string `json:"command"`
}

// ps asks the guest: on the host there is nothing to see of its processes.
func ps(ctx context.Context, c *call) (err error) {
	e, err := c.one()
	if err != nil {
		return err
	}
	containers := e.containers()
	if _, ok := e.State.Containers[c.operands[0]]; ok && c.operands[0] != e.State.ID {
		containers = []string{c.operands[0]}
	}
	ctx, cancel := context.WithTimeout(ctx, psTimeout)
	defer cancel()
	guest := agent.New(agent.Settings{URL: e.State.Agent})
	defer func() { _ = guest.Disconnect() }()
	all := []processRow{}
	rows := [][]string{{"CONTAINER", "PID", "PARENT", "UID", "COMMAND"}}
	for _, id := range containers {
		list, err := guest.Pids(ctx, id)
		if err != nil {
			return fmt.Errorf("processes of container %q: %w", id, err)
		}
		for _, p := range list {
			r := processRow{id, p.GetPid(), p.GetParentPid(), p.GetUid(), p.GetExecId(), printable(p.GetCommand())}
			all = append(all, r)
			rows = append(rows, []string{id, decimal(r.PID), decimal(r.Parent), decimal(r.UID), r.Command})
		}
	}
	return c.print(all, rows)
}

func decimal(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// printable keeps a guest from writing to the terminal what it likes.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, s[:min(len(s), 1024)])
}
