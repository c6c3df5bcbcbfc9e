package qemu

import (
	"slices"
	"strings"
	"testing"
)

func TestLastWords(t *testing.T) {
	const panicked = "[    2.22] Kernel panic - not syncing: Fatal exception in interrupt"
	for name, tt := range map[string]struct{ console, want []string }{
		"nothing":  {[]string{"booted"}, nil},
		"no panic": {[]string{"[ 2.1] Oops: 0002 [#1] SMP", "[ 2.1] RIP: 0010:f+0x1/0x2"}, nil},
		"panic":    {[]string{"booted", panicked, "[ 2.3] RIP: 0010:f+0x1/0x2"}, []string{panicked}},
		"oops": {
			[]string{
				"[ 2.1] BUG: unable to handle page fault for address: ffffcc", "[ 2.1] Oops: Oops: 0002 [#1] PREEMPT SMP",
				"[ 2.1] RIP: 0010:f+0x1/0x2", "[ 2.1] Call Trace:", "[ 2.2] RIP: 0033:0x4711", panicked, "[ 2.3] Kernel Offset: disabled",
			},
			[]string{"[ 2.1] Oops: Oops: 0002 [#1] PREEMPT SMP", "[ 2.1] RIP: 0010:f+0x1/0x2", panicked},
		},
		"arm64": {
			[]string{"[ 2.1] Internal error: Oops: 96000004 [#1] SMP", "[ 2.1] pc : f+0x1/0x2", "[ 2.1] lr : g", panicked},
			[]string{"[ 2.1] Internal error: Oops: 96000004 [#1] SMP", "[ 2.1] pc : f+0x1/0x2", panicked},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := lastWords(tt.console); !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
			e := &ExitError{Console: tt.console}
			if text := e.Error(); !strings.Contains(text, strings.Join(tt.want, " | ")) {
				t.Errorf("error %q", text)
			}
		})
	}
}
