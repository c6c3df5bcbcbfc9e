package boot

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// TrivialParam is the kernel parameter that makes the first process print
// TrivialLine and power off: what a benchmark compares a real start with.
const (
	TrivialParam = "vmshim.trivial"
	TrivialLine  = "vmshim-trivial-init\n"
)

// Params are the kernel parameters that are meant for user space.
type Params struct {
	Trivial bool
	Ready   Ready
	Agent   AgentParams
}

// AgentParams are the settings of the Kata protocol's agent.* parameters that
// concern this agent. Zero means: not given.
type AgentParams struct {
	LogLevel           string        // agent.log
	LogPort            uint32        // agent.log_vport
	DebugConsole       bool          // agent.debug_console
	DebugConsolePort   uint32        // agent.debug_console_vport
	DevMode            bool          // agent.devmode
	ServerAddr         string        // agent.server_addr
	HotplugTimeout     time.Duration // agent.hotplug_timeout, in seconds
	ContainerPipeBytes int           // agent.container_pipe_size
}

// ReadParams reads the parameters of the running kernel. What it can't
// understand is in the error, the rest is in Params all the same.
func ReadParams() (Params, error) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return Params{}, err
	}
	return ParseParams(string(b))
}

// ParseParams reads a kernel command line. It ignores parameters it does not
// know, other agents' among them, and skips those whose value is wrong, with
// an error that names each.
func ParseParams(cmdline string) (Params, error) {
	var p Params
	var errs []error
	for _, field := range split(cmdline) {
		key, value, _ := strings.Cut(field, "=")
		if err := p.set(key, value); err != nil {
			errs = append(errs, fmt.Errorf("kernel parameter %.100q: %w", key, err))
		}
	}
	return p, errors.Join(errs...)
}

func (p *Params) set(key, value string) (err error) {
	a := &p.Agent
	switch key {
	case TrivialParam:
		p.Trivial = true
	case extension.ReadyParam:
		p.Ready, err = parseReady(value)
	case "agent.log":
		a.LogLevel = value
	case "agent.log_vport":
		err = number(value, &a.LogPort)
	case "agent.debug_console":
		a.DebugConsole = true
	case "agent.debug_console_vport":
		err = number(value, &a.DebugConsolePort)
	case "agent.devmode":
		a.DevMode = true
	case "agent.server_addr":
		a.ServerAddr = value
	case "agent.hotplug_timeout":
		var seconds uint32
		err = number(value, &seconds)
		a.HotplugTimeout = time.Duration(seconds) * time.Second
	case "agent.container_pipe_size":
		var bytes uint32
		err = number(value, &bytes)
		a.ContainerPipeBytes = int(min(bytes, 1<<30))
	}
	return err
}

func number(s string, to *uint32) error {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return errors.New("not a number")
	}
	*to = uint32(n)
	return nil
}

// split does what the kernel's next_arg does: spaces separate, double quotes
// protect them and may stand around a value or the whole.
func split(s string) []string {
	var fields []string
	var b strings.Builder
	quoted, started := false, false
	for _, c := range []byte(s) {
		switch {
		case c == '"':
			quoted, started = !quoted, true
		case !quoted && strings.IndexByte(" \t\n\v\f\r\x00", c) >= 0:
			if started {
				fields = append(fields, b.String())
			}
			b.Reset()
			started = false
		default:
			b.WriteByte(c)
			started = true
		}
	}
	if started {
		fields = append(fields, b.String())
	}
	return fields
}
