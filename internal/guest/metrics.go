package guest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// GetMetrics implements the protocol: Prometheus text about the guest and the
// agent, under the names that its users know.
func (s *service) GetMetrics(context.Context, *protocol.GetMetricsRequest) (*protocol.Metrics, error) {
	var out strings.Builder
	for _, m := range []struct {
		file  string
		write func(out *strings.Builder, text string)
	}{
		{"/proc/meminfo", writeMeminfo},
		{"/proc/loadavg", writeLoad},
		{"/proc/self/status", writeAgent},
	} {
		b, err := os.ReadFile(m.file)
		if err != nil {
			return nil, err
		}
		m.write(&out, string(b))
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	const name = "kata_agent_process_open_fds"
	writeHead(&out, name, "Open files of the agent.")
	fmt.Fprintf(&out, "%s %d\n", name, len(files))
	return &protocol.Metrics{Metrics: out.String()}, nil
}

func writeHead(out *strings.Builder, name, help string) {
	fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s gauge\n", name, help, name)
}

func writeMeminfo(out *strings.Builder, text string) {
	const name = "kata_guest_meminfo"
	writeHead(out, name, "Memory of the guest, in bytes.")
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		kb, isKB := strings.CutSuffix(strings.TrimSpace(value), " kB")
		n, err := strconv.ParseUint(strings.TrimSpace(kb), 10, 64)
		if err != nil {
			continue
		}
		if isKB {
			n <<= 10
		}
		key = strings.ToLower(strings.NewReplacer("(", "_", ")", "").Replace(key))
		fmt.Fprintf(out, "%s{item=%q} %d\n", name, key, n)
	}
}

func writeLoad(out *strings.Builder, text string) {
	const name = "kata_guest_load"
	fields := strings.Fields(text)
	if len(fields) < 3 {
		return
	}
	writeHead(out, name, "Load of the guest.")
	for i, item := range []string{"load1", "load5", "load15"} {
		if _, err := strconv.ParseFloat(fields[i], 64); err == nil {
			fmt.Fprintf(out, "%s{item=%q} %s\n", name, item, fields[i])
		}
	}
}

func writeAgent(out *strings.Builder, text string) {
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		if !slices.Contains([]string{"Threads", "VmRSS", "VmSize"}, key) {
			continue
		}
		kb, isKB := strings.CutSuffix(strings.TrimSpace(value), " kB")
		n, err := strconv.ParseUint(kb, 10, 64)
		if err != nil {
			continue
		}
		if isKB {
			n <<= 10
		}
		name := map[string]string{
			"Threads": "kata_agent_threads", "VmRSS": "kata_agent_total_rss", "VmSize": "kata_agent_total_vm",
		}[key]
		writeHead(out, name, "Of the agent, in bytes or threads.")
		fmt.Fprintf(out, "%s %d\n", name, n)
	}
}
