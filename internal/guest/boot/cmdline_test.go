package boot

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseParams(t *testing.T) {
	for _, tt := range []struct {
		name, cmdline string
		want          Params
		err           string // part of it
	}{
		{name: "nothing", cmdline: ""},
		{name: "other people's", cmdline: "console=ttyS0 quiet root=/dev/vda1 agents=3\n"},
		{
			name: "meant for other agents", cmdline: "agent.trace quiet agent.cdh_api_timeout=50 agent.debug_console agent.debug_console_vport=1026",
			want: Params{Agent: AgentParams{Ignored: []string{"agent.trace", "agent.cdh_api_timeout", "agent.debug_console", "agent.debug_console_vport"}}},
		},
		{name: "trivial", cmdline: "quiet vmshim.trivial", want: Params{Trivial: true}},
		{
			name: "ready", cmdline: "vmshim.ready=cid panic=-1",
			want: Params{Ready: true},
		},
		{
			name: "agent",
			cmdline: "agent.log=debug agent.log_vport=1025 agent.devmode " +
				"agent.server_addr=vsock://-1:1024 agent.hotplug_timeout=3 agent.container_pipe_size=65536",
			want: Params{Agent: AgentParams{
				LogLevel: "debug", LogPort: 1025, DevMode: true,
				ServerAddr: "vsock://-1:1024", HotplugTimeout: 3 * time.Second, ContainerPipeBytes: 65536,
			}},
		},
		{
			name: "quotes", cmdline: `dyndbg="module a +p" agent.server_addr="unix:///a b" "agent.log=info"`,
			want: Params{Agent: AgentParams{ServerAddr: "unix:///a b", LogLevel: "info"}},
		},
		{name: "the last one wins", cmdline: "agent.log=info agent.log=warn", want: Params{Agent: AgentParams{LogLevel: "warn"}}},
		{
			name: "one is wrong", cmdline: "agent.hotplug_timeout=soon agent.log_vport=1025",
			want: Params{Agent: AgentParams{LogPort: 1025}}, err: `kernel parameter "agent.hotplug_timeout": not a number`,
		},
		{name: "no level", cmdline: "agent.log=loud agent.devmode=1", want: Params{Agent: AgentParams{DevMode: true}}, err: `kernel parameter "agent.log": not a log level`},
		{name: "critical", cmdline: "agent.log=critical", want: Params{Agent: AgentParams{LogLevel: "critical"}}},
		{name: "port of another", cmdline: "agent.log_vport=1024", err: "not a free port"},
		{name: "port of all", cmdline: "agent.log_vport=4294967295", err: "not a free port"},
		{name: "negative", cmdline: "agent.hotplug_timeout=-1 agent.container_pipe_size=4294967296", err: "agent.container_pipe_size"},
		{name: "flag", cmdline: "agent.devmode=perhaps", err: "neither true nor false"},
		{name: "no flag", cmdline: "agent.devmode=false"},
		{name: "cgroup version 2", cmdline: "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"},
		{name: "cgroup version 1", cmdline: "systemd.unified_cgroup_hierarchy=0", err: "containers have cgroup version 2"},
		{name: "no way to be ready", cmdline: "vmshim.ready", err: "not cid"},
		{name: "another way to be ready", cmdline: "vmshim.ready=4711:0a1b", err: "not cid"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseParams(tt.cmdline)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("ParseParams(%q) (-want +got):\n%s", tt.cmdline, diff)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("ParseParams(%q) = %v, want %q in it", tt.cmdline, err, tt.err)
			}
		})
	}
}

func FuzzParseParams(f *testing.F) {
	for _, s := range []string{
		"console=ttyS0 quiet vmshim.ready=cid agent.log=debug",
		`a="b c" "d=e f" agent.hotplug_timeout=3 vmshim.trivial`,
		"agent.container_pipe_size=99999999999 vmshim.ready=:",
		"\"\x00=\" agent.log_vport=-1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, _ := ParseParams(s)
		if p.Agent.HotplugTimeout < 0 || p.Agent.ContainerPipeBytes < 0 {
			t.Errorf("Agent = %+v", p.Agent)
		}
	})
}
