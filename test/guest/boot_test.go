package guest

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

func TestVMGuest(t *testing.T) {
	const agent = "$(busybox dirname $(busybox grep -la '^vmshim-agent.agent' /guest/proc/[0-9]*/cmdline))"
	g := boot(t)
	for _, tt := range []struct {
		name, script string
		want         []string // what must be in the output
	}{
		{
			name:   "controllers of cgroup v2 are handed down",
			script: "cat /guest/sys/fs/cgroup/cgroup.subtree_control",
			want:   []string{"cpu", "cpuset", "io", "memory", "pids", "hugetlb"},
		},
		{
			name:   "the agent is a child of the first process",
			script: "busybox grep PPid " + agent + "/status",
			want:   []string{"PPid:\t1\n"},
		},
		{
			name:   "the agent stays in the guest's mount namespace",
			script: "[ $(busybox readlink /guest/proc/1/ns/mnt) = $(busybox readlink " + agent + "/ns/mnt) ]",
		},
		{
			name:   "the kernel kills containers first",
			script: "busybox cat " + agent + "/oom_score_adj /proc/self/oom_score_adj",
			want:   []string{"-999\n0\n"},
		},
		{
			name:   "nobody is left unreaped",
			script: "busybox cat /guest/proc/[0-9]*/status 2>/dev/null | busybox grep -A4 '^State:.Z' | busybox grep '^PPid:.1$' || echo none",
			want:   []string{"none\n"},
		},
		{
			name:   "limits are not those of a small machine",
			script: "ulimit -Hn; ulimit -u; busybox cat /proc/sys/kernel/threads-max",
			want:   []string{"1048576\n", "unlimited\n", "1048576\n"},
		},
		{
			name: "memory is compacted when it has to be, not twice a second",
			script: "switches() { busybox grep ctxt $(busybox dirname $(busybox grep -l ^kcompactd /guest/proc/[0-9]*/comm))/status; }; " +
				"switches; before=$(switches); busybox sleep 2; [ \"$before\" = \"$(switches)\" ] && echo asleep",
			want: []string{"voluntary_ctxt_switches:", "asleep\n"},
		},
		{
			name:   "the kernel gets modules it misses",
			script: "busybox ip link add dummy7 type dummy && busybox ip link show dummy7",
			want:   []string{"dummy7"},
		},
		{
			name:   "file systems come when they are asked for",
			script: "for fs in xfs erofs squashfs vfat isofs; do busybox mount -t $fs /nothing /tmp; done 2>/dev/null; busybox cat /proc/filesystems",
			want:   []string{"\text4\n", "\txfs\n", "\terofs\n", "\tsquashfs\n", "\tvfat\n", "virtiofs\n", "overlay\n"},
		},
		{
			name: "iptables works",
			script: "for i in iptables ip6tables; do " +
				"busybox chroot /guest $i -t nat -A POSTROUTING -j MASQUERADE && " +
				"busybox chroot /guest $i -A INPUT -p tcp -m conntrack --ctstate NEW -m multiport --dports 80,443 -j REJECT && " +
				"busybox chroot /guest $i-save || exit 1; done; " +
				"busybox chroot /guest iptables-save | busybox chroot /guest iptables-restore",
			want: []string{"-A POSTROUTING -j MASQUERADE\n", "icmp-port-unreachable\n", "icmp6-port-unreachable\n"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := g.on(t).run(tt.script)
			for _, want := range tt.want {
				if !strings.Contains(got, want) {
					t.Errorf("%s\nprinted %q, want %q in it", tt.script, got, want)
				}
			}
		})
	}
}

// A press of the power button ends the guest in order.
func TestVMPowerButton(t *testing.T) {
	g := boot(t)
	// Shutdown presses it after half of the time.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := g.Shutdown(ctx); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	mustHave(t, g.Machine, "power button pressed", "reboot: Power down")
}

// Without its agent a guest is of no use: it says so and ends, and what it was
// asked ends.
func TestVMAgentKilled(t *testing.T) {
	g := boot(t)
	c := agent.New(agent.Settings{Dial: g.Dial})
	t.Cleanup(func() { _ = c.Disconnect() })
	ctx, ends := vmtest.Context(t), make(chan error)
	if err := c.Check(ctx); err != nil {
		t.Fatal(err)
	}
	go func() { _, err := c.WaitProcess(ctx, "probe", ""); ends <- err }()
	go func() { _, err := c.OOMEvent(ctx); ends <- err }()
	g.start("echo i >/guest/proc/sysrq-trigger") // SIGKILL for all but the first process
	select {
	case <-g.Done():
	case <-time.After(vmtest.Timeout):
		t.Fatal("the guest goes on")
	}
	for range 2 {
		if err := <-ends; !errdefs.IsUnavailable(err) {
			t.Errorf("a call ends with %v", err)
		}
	}
	mustHave(t, g.Machine, "agent ended by signal: killed", "reboot: Power down")
}

// What a benchmark compares a start with.
func TestVMTrivialInit(t *testing.T) {
	m := vmtest.Start(t, func(s *hypervisor.Spec) { s.KernelParams = append(s.KernelParams, "vmshim.trivial") })
	select {
	case <-m.Done():
	case <-time.After(vmtest.Timeout):
		t.Fatal("the guest does not end")
	}
	mustHave(t, m, "vmshim-trivial-init")
}

func mustHave(t *testing.T, m *vmtest.Machine, texts ...string) {
	t.Helper()
	for _, want := range texts {
		if !strings.Contains(m.Console(), want) {
			t.Errorf("console has no %q:\n%s", want, m.Console())
		}
	}
}
