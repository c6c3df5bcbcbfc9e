package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// writeHooks puts programs for every stage into the share: each writes what it is
// told to a file.
func (m *machine) writeHooks() {
	m.tb.Helper()
	write := func(name, text string) {
		path := filepath.Join(m.Share, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			m.tb.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			m.tb.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		m.tb.Fatal(err)
	}
	write("busybox", string(busybox))
	write("hooklog", "")
	for _, stage := range []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"} {
		write("hooks/"+stage+"/1", "#!"+shareDir+"/busybox sh\nread -r state\necho "+stage+" $state >> "+shareDir+"/hooklog\n")
	}
}

func guestHooks(t *testing.T, m *machine) {
	log := filepath.Join(m.Share, "hooklog")
	stages := func() string {
		t.Helper()
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for line := range strings.Lines(string(b)) {
			stage, state, _ := strings.Cut(line, " ")
			if !strings.Contains(state, `id:hooked`) && !strings.Contains(state, `"id":"hooked"`) {
				t.Errorf("%s was told %s", stage, state)
			}
			list = append(list, stage)
		}
		if err := os.Truncate(log, 0); err != nil {
			t.Fatal(err)
		}
		return strings.Join(list, " ")
	}
	if err := os.Truncate(log, 0); err != nil {
		t.Fatal(err)
	}
	m.create("hooked", nil, "/bin/sleep", "1000")
	if got := stages(); got != "prestart createRuntime createContainer" {
		t.Errorf("at create: %s", got)
	}
	m.startContainer("hooked")
	if got := stages(); got != "startContainer poststart" {
		t.Errorf("at start: %s", got)
	}
	m.remove("hooked")
	if got := stages(); got != "poststop" {
		t.Errorf("at the end: %s", got)
	}
}
