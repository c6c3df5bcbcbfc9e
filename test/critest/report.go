package main

import (
	"encoding/xml"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// A result has the outcome of each test: passed, failed, skipped.
type result map[string]string

const (
	passed  = "passed"
	skipped = "skipped"
)

// namePrefix begins every test's name.
const namePrefix = "[k8s.io] "

func readReport(path string) (result, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("no report: %w", err)
	}
	return parseReport(text)
}

// parseReport reads JUnit's form, as Ginkgo writes it.
func parseReport(text []byte) (result, error) {
	var report struct {
		Cases []struct {
			Name   string `xml:"name,attr"`
			Status string `xml:"status,attr"`
		} `xml:"testsuite>testcase"`
	}
	if err := xml.Unmarshal(text, &report); err != nil {
		return nil, fmt.Errorf("decode report: %w", err)
	}
	r := result{}
	for _, c := range report.Cases {
		if name, ok := strings.CutPrefix(c.Name, "[It] "); ok {
			r[strings.TrimPrefix(name, namePrefix)] = c.Status
		}
	}
	return r, nil
}

// maxExceptions is how many tests a machine may fail that runc passes.
const maxExceptions = 5

// exceptionsTitle heads the table of the documentation that has them.
const exceptionsTitle = "| critest | why"

// exceptions reads from the documentation which tests need not pass, and why.
func exceptions(path string) (map[string]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	inTable := false
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, exceptionsTitle) {
			inTable = true
			continue
		}
		cells := strings.Split(line, "|")
		if !inTable || len(cells) != 4 {
			inTable = false
			continue
		}
		if name := strings.TrimSpace(cells[1]); strings.Trim(name, "-") != "" { // not the line below the title
			found[name] = strings.TrimSpace(cells[2])
		}
	}
	if len(found) > maxExceptions {
		return nil, fmt.Errorf("%s excuses %d tests, more than %d", path, len(found), maxExceptions)
	}
	return found, nil
}

// isWorse compares with an outcome on the first handler.
func isWorse(first, outcome string) bool { return first == passed && outcome != passed }

// table shows the tests that passed on the first handler or on any, and says
// whether the others do as well as it does. An exception that passes everywhere,
// or that no test has the name of, is a failure too when all tests were run.
func table(results map[string]result, handlers []string, allowed map[string]string, all bool) (text string, ok bool) {
	var b strings.Builder
	fmt.Fprintf(&b, "| test | %s | |\n|---|%s---|\n", strings.Join(handlers, " | "), strings.Repeat("---|", len(handlers)))
	ok = true
	base := results[handlers[0]]
	compared := 0
	for _, test := range slices.Sorted(maps.Keys(base)) {
		row, worse, ran := []string{test}, false, false
		for _, h := range handlers {
			outcome := results[h][test]
			row = append(row, outcome)
			worse = worse || isWorse(base[test], outcome)
			ran = ran || outcome != skipped && outcome != ""
		}
		if !ran {
			continue
		}
		compared++
		reason, excused := allowed[test]
		verdict := ""
		switch {
		case worse && excused:
			verdict = "excused: " + reason
		case worse:
			verdict, ok = "WORSE", false
		case excused && all:
			verdict, ok = "excused, but passes", false
		case base[test] != passed:
			verdict = "not on runc either"
		}
		fmt.Fprintf(&b, "| %s | %s |\n", strings.Join(row, " | "), verdict)
	}
	for name := range allowed {
		if _, known := base[name]; !known && all {
			fmt.Fprintf(&b, "| %s | excused, but there is no such test |\n", name)
			ok = false
		}
	}
	if compared == 0 {
		fmt.Fprintln(&b, "no test ran")
		ok = false
	}
	return b.String(), ok
}

// summary counts by handler. What is worse than on the first one is either
// excused or a failure of ours.
func summary(results map[string]result, handlers []string, allowed map[string]string, took map[string]time.Duration) string {
	var b strings.Builder
	fmt.Fprint(&b, "| | passed | failed | skipped | as on "+handlers[0]+" | excused | worse | minutes |\n|---|"+strings.Repeat("---:|", 7)+"\n")
	base := results[handlers[0]]
	for _, h := range handlers {
		count := map[string]int{}
		for test, outcome := range base {
			_, excused := allowed[test]
			switch worse := isWorse(outcome, results[h][test]); {
			case worse && excused:
				count["excused"]++
			case worse:
				count["worse"]++
			case outcome == passed:
				count["same"]++
			}
		}
		for _, outcome := range results[h] {
			if outcome != passed && outcome != skipped {
				outcome = "failed" // by a panic, or out of time
			}
			count[outcome]++
		}
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %d | %.0f |\n", h, count[passed], count["failed"], count[skipped],
			count["same"], count["excused"], count["worse"], took[h].Minutes())
	}
	return b.String()
}
