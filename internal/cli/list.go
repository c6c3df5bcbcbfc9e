package cli

import (
	"context"
	"strconv"
	"strings"
	"time"
)

func list(_ context.Context, c *call) error {
	all, err := c.entries()
	if err != nil {
		return err
	}
	rows := [][]string{{"SANDBOX", "NAMESPACE", "STATUS", "AGE", "SHIM", "QEMU", "VCPUS", "MEMORY", "CONTAINERS"}}
	for _, e := range all {
		rows = append(rows, e.row())
	}
	return c.print(all, rows)
}

func (e entry) row() []string {
	if e.State == nil {
		return []string{e.name(), "-", "unreadable", "-", "-", "-", "-", "-", e.Fault}
	}
	st := e.State
	status := "dead" // containerd's next start or 'delete' cleans up
	switch {
	case e.Alive && st.Ready:
		status = "running"
	case e.Alive:
		status = "starting"
	}
	age, qemu := "-", "-"
	if len(st.Timeline) > 0 {
		age = time.Since(st.Timeline[0].At).Round(time.Second).String()
	}
	for _, p := range st.Processes {
		if p.Role == "qemu" {
			qemu = strconv.Itoa(p.PID)
		}
	}
	return []string{
		st.ID, st.Namespace, status, age, strconv.Itoa(st.Shim.PID), qemu,
		strconv.Itoa(st.VCPUs), strconv.Itoa(st.MemoryMiB) + " MiB", strings.Join(e.containers(), " "),
	}
}
