package boot

import (
	"errors"
	"fmt"
	"math"
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
	Ready   bool // tell the host that the agent serves
	Agent   AgentParams
}

// AgentParams are the settings of the Kata protocol's agent.* parameters that
// concern this agent. Zero means: not given.
type AgentParams struct {
	LogLevel           string        // agent.log
	LogPort            uint32        // agent.log_vport
	DevMode            bool          // agent.devmode
	ServerAddr         string        // agent.server_addr
	HotplugTimeout     time.Duration // agent.hotplug_timeout, in seconds
	ContainerPipeBytes int           // agent.container_pipe_size

	// Ignored names the others of the protocol's parameters that were given.
	Ignored []string
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

// ParseParams reads a kernel command line. It skips parameters it does not
// know, naming those that are meant for an agent, and those whose value is
// wrong, with an error that names each.
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
		if _, err = parseLevel(value); err == nil {
			a.LogLevel = value
		}
	case "agent.log_vport":
		err = port(value, &a.LogPort)
	case "agent.devmode":
		a.DevMode, err = flag(value)
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
	case "systemd.unified_cgroup_hierarchy":
		// What asks for version 2 asks for what there is.
		if unified, ferr := flag(value); ferr != nil || !unified {
			err = errors.New("containers have cgroup version 2")
		}
	default:
		if strings.HasPrefix(key, "agent.") && len(a.Ignored) < maxIgnored {
			a.Ignored = append(a.Ignored, key)
		}
	}
	return err
}

// maxIgnored bounds a log line.
const maxIgnored = 32

func number(s string, to *uint32) error {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return errors.New("not a number")
	}
	*to = uint32(n)
	return nil
}

// port reads a vsock port that nothing else of the guest listens on.
func port(s string, to *uint32) error {
	var n uint32
	if err := number(s, &n); err != nil {
		return err
	}
	if n == 0 || n == math.MaxUint32 || n == extension.AgentPort || n == extension.StreamPort {
		return errors.New("not a free port")
	}
	*to = n
	return nil
}

// flag reads a parameter that counts by being there, or by its value.
func flag(s string) (bool, error) {
	if s == "" {
		return true, nil
	}
	v, err := strconv.ParseBool(s)
	if err != nil {
		return false, errors.New("neither true nor false")
	}
	return v, nil
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
