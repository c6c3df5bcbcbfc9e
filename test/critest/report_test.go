package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseReport(t *testing.T) {
	got, err := parseReport([]byte(`<testsuites><testsuite name="CRI validation">
<testcase name="[BeforeSuite]" status="passed"/>
<testcase name="[It] [k8s.io] Pod works" status="passed"/>
<testcase name="[It] [k8s.io] Pod does not" status="failed"><failure message="x"/></testcase>
</testsuite></testsuites>`))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(result{"Pod works": "passed", "Pod does not": "failed"}, got); d != "" {
		t.Error(d)
	}
	if _, err := parseReport([]byte("no report")); err == nil {
		t.Error("nonsense is a report")
	}
}

func TestTable(t *testing.T) {
	for name, tt := range map[string]struct {
		runc, ours string
		allowed    string
		all        bool
		ok         bool
		says       string
	}{
		"passes":                    {"passed", "passed", "", true, true, "| test | passed | passed |  |"},
		"fails":                     {"passed", "failed", "", true, false, "WORSE"},
		"skipped":                   {"passed", "skipped", "", true, false, "WORSE"},
		"not run":                   {"passed", "", "", true, false, "WORSE"},
		"excused":                   {"passed", "failed", "test", true, true, "excused: why"},
		"excused for nothing":       {"passed", "passed", "test", true, false, "but passes"},
		"excused for nothing, some": {"passed", "passed", "test", false, true, "passed"},
		"excuse without a test":     {"passed", "passed", "other", true, false, "no such test"},
		"neither":                   {"failed", "failed", "", true, true, "not on runc either"},
		"better":                    {"failed", "passed", "", true, true, "not on runc either"},
		"skipped everywhere":        {"skipped", "skipped", "", true, false, "no test ran"},
	} {
		t.Run(name, func(t *testing.T) {
			allowed := map[string]string{}
			if tt.allowed != "" {
				allowed[tt.allowed] = "why"
			}
			results := map[string]result{"runc": {"test": tt.runc}, "vm": {}}
			if tt.ours != "" {
				results["vm"]["test"] = tt.ours
			}
			text, ok := table(results, []string{"runc", "vm"}, allowed, tt.all)
			if ok != tt.ok || !strings.Contains(text, tt.says) {
				t.Errorf("ok %v:\n%s", ok, text)
			}
		})
	}
}

func TestExceptions(t *testing.T) {
	found, err := exceptions("../../docs/limitations.md")
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Error("the documentation excuses nothing: is the table there?")
	}
	for name, reason := range found {
		if len(reason) < 10 {
			t.Errorf("%s: no reason", name)
		}
	}
	path := filepath.Join(t.TempDir(), "many.md")
	text := "| critest | why |\n|---|---|\n" + strings.Repeat("| a | b |\n", 1)
	for _, name := range []string{"b", "c", "d", "e", "f"} {
		text += "| " + name + " | because |\n"
	}
	if err := os.WriteFile(path, []byte(text+"\n| other | table |\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := exceptions(path); err == nil {
		t.Error("six are excused")
	}
}

func TestSummary(t *testing.T) {
	results := map[string]result{
		"runc": {"a": "passed", "b": "passed", "c": "passed", "d": "failed", "e": "skipped"},
		"vm":   {"a": "passed", "b": "panicked", "c": "skipped", "d": "passed", "e": "skipped"},
	}
	got := summary(results, []string{"runc", "vm"}, map[string]string{"b": "why"}, map[string]time.Duration{"vm": 90 * time.Second})
	for _, want := range []string{"| runc | 3 | 1 | 1 | 3 | 0 | 0 | 0 |", "| vm | 2 | 1 | 2 | 1 | 1 | 1 | 2 |"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

func TestProgress(t *testing.T) {
	log := `Will run 4 of 6 specs
------------------------------
[BeforeSuite] PASSED [0.001 seconds]
------------------------------
[k8s.io] Pod works [Conformance]
file.go:1
  STEP: go
• [0.118 seconds]
------------------------------
SS
------------------------------
[k8s.io] Pod does not
------------------------------
• [FAILED] [60.5 seconds]
[k8s.io] Pod [It] does not
------------------------------
[k8s.io] Pod cannot
• [FAILED] [0.5 seconds]
------------------------------
[k8s.io] Pod may
S [SKIPPED] [0.005 seconds]
`
	var out strings.Builder
	p := &progress{
		out: &out, handler: "vm", allowed: map[string]string{"Pod cannot": "why"},
		base: result{"Pod does not": "passed", "Pod cannot": "passed", "Pod may": "failed"},
	}
	for i := range len(log) {
		if n, err := p.Write([]byte(log[i : i+1])); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	want := `vm           1 of 4    0.118 s  passed   Pod works [Conformance]
vm           2 of 4     60.5 s  failed   Pod does not (WORSE)
vm           3 of 4      0.5 s  failed   Pod cannot (excused)
vm           4 of 4    0.005 s  skipped  Pod may
`
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Error(d)
	}
}
