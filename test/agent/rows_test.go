// Package agent_test proves the agent interface in a running guest: the rows
// of operations here, and the wire by an implementation that shares no code.
package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent"
)

// A row is one operation and how it is proven: by what the guest or the kernel
// shows (an observer in the guest, see observer), never by the reply alone.
type row struct {
	number    int
	operation string // the method of agent.Agent
	rpc       string // what carries it; "–" when nothing does
	proof     string // what is looked at
	// prove does it. It is called twice: with the agent, and with one whose
	// operation succeeds without effect, when it has to fail.
	prove func(*env)
	// sabotage makes the latter of the former.
	sabotage func(agent.Agent) agent.Agent
}

// rows are all operations: 1 to 49 are those that the project exists to
// provide, 50 to 53 came later, from 54 on are the RPCs that no operation
// reaches and what this project has besides.
var rows = slices.Concat(
	lifecycleRows, containerRows, processRows, resourceRows, networkRows, guestRows, volumeRows,
)

// TestRows holds the table against the interface: every operation is a row,
// and the sabotage of a row replaces that operation and no other.
func TestRows(t *testing.T) {
	slices.SortFunc(rows, func(a, b row) int { return a.number - b.number })
	operations := map[string]bool{}
	for i, r := range rows {
		if r.number != i+1 {
			t.Errorf("row %d is number %d", i+1, r.number)
		}
		if operations[r.operation] {
			t.Errorf("%s has two rows", r.operation)
		}
		operations[r.operation] = true
		own := reflect.TypeOf(r.sabotage(nil))
		if own.Name() != "no"+r.operation {
			t.Errorf("%s is sabotaged by %s", r.operation, own.Name())
		}
	}
	for m := range reflect.TypeFor[agent.Agent]().Methods() {
		if !operations[m.Name] {
			t.Errorf("%s has no row", m.Name)
		}
		delete(operations, m.Name)
	}
	if len(operations) > 0 {
		t.Errorf("rows of no operation: %v", operations)
	}
}

// A result is a line of the table.
type result struct {
	row
	took time.Duration
	err  error // why the proof failed
	red  error // why it failed under sabotage, as it must
}

func (r result) passed() bool { return r.err == nil && r.red != nil }

// TestVMRows proves every row in a running guest, and that the proof notices
// when the operation does nothing. Rows share a machine unless they need one
// of their own, and leave it as it was. The table goes to the standard output,
// and to the file that VMSHIM_ROWS names.
func TestVMRows(t *testing.T) {
	slices.SortFunc(rows, func(a, b row) int { return a.number - b.number })
	g := startGuest(t)
	before := g.state(t)
	var results []result
	for _, r := range rows {
		passed := t.Run(fmt.Sprintf("%02d-%s", r.number, r.operation), func(t *testing.T) {
			res := result{row: r}
			// A row that ends the test is a line as well.
			defer func() { results = append(results, res) }()
			res.err = errors.New("did not end")
			began := time.Now()
			res.err = prove(t, g, r, vmtest.Timeout, func(a agent.Agent) agent.Agent { return a })
			res.took = time.Since(began)
			if res.err != nil {
				t.Errorf("proof: %v", res.err)
				return
			}
			// What it needed to succeed is enough to fail, with some room.
			patience := time.Second + res.took*3/2
			if res.red = prove(t, g, r, patience, r.sabotage); res.red == nil {
				t.Error("the proof does not notice that the operation does nothing")
			} else {
				t.Logf("sabotaged: %v", res.red)
			}
		})
		if !passed && !g.answers() {
			t.Errorf("the guest does not answer any more: the rows after %d were not tried", r.number)
			break
		}
	}
	if after := g.state(t); after != before {
		t.Errorf("the guest had\n%s\nand has\n%s", before, after)
	}
	table := format(results)
	_, _ = io.WriteString(os.Stdout, "\n"+table+"\n")
	if path := os.Getenv("VMSHIM_ROWS"); path != "" {
		if err := os.WriteFile(path, []byte(table), 0o644); err != nil {
			t.Error(err)
		}
	}
}

// format is the table for people.
func format(results []result) string {
	var b strings.Builder
	passed := 0
	fmt.Fprintf(&b, "%3s  %-6s %-9s %-23s %-31s %s\n", "row", "proof", "sabotaged", "operation", "rpc", "what is looked at")
	for _, r := range results {
		verdict, sabotaged := "pass", "red"
		if r.err != nil {
			verdict, sabotaged = "FAIL", "–"
		} else if r.red == nil {
			sabotaged = "GREEN"
		}
		if r.passed() {
			passed++
		}
		fmt.Fprintf(&b, "%3d  %-6s %-9s %-23s %-31s %s (%.1f s)\n", r.number, verdict, sabotaged, r.operation, r.rpc, r.proof, r.took.Seconds())
	}
	fmt.Fprintf(&b, "%d of %d rows pass\n", passed, len(results))
	return b.String()
}

// prove runs a row's proof once, within a time, with what wrap makes of agents.
func prove(t *testing.T, g *guest, r row, within time.Duration, wrap func(agent.Agent) agent.Agent) (err error) {
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	e := &env{t: t, ctx: ctx, guest: g, wrap: wrap, Agent: wrap(g.client)}
	defer func() {
		// What a row leaves is looked for at the end; what it can't undo is said here.
		if uerr := e.undo.Run(); uerr != nil {
			t.Errorf("clean up: %v", uerr)
		}
	}()
	defer func() {
		switch p := recover().(type) {
		case nil:
		case failure:
			err = p.error
			if e.awaited != "" {
				err = fmt.Errorf("never: %s: %w", e.awaited, err)
			}
		default:
			panic(p)
		}
	}()
	r.prove(e)
	return nil
}

// An env is what a proof works with.
type env struct {
	agent.Agent // of the shared machine; maybe sabotaged
	t           *testing.T
	ctx         context.Context
	guest       *guest
	wrap        func(agent.Agent) agent.Agent
	awaited     string        // what until waits for
	undo        cleanup.Stack // in the end, by agents that are not sabotaged
}

// A failure ends a proof.
type failure struct{ error }

func (e *env) fail(format string, args ...any) {
	panic(failure{fmt.Errorf(format, args...)})
}

// ok fails unless there is no error.
func (e *env) ok(err error) {
	if err != nil {
		panic(failure{err})
	}
}

// is fails when an error is not of a class.
func (e *env) is(what string, err, class error) {
	if !errors.Is(err, class) {
		e.fail("%s: got error %v, want one of class %v", what, err, class)
	}
}

func (e *env) equal(what string, got, want any) {
	if !reflect.DeepEqual(got, want) {
		e.fail("%s: got %v, want %v", what, got, want)
	}
}

// until waits for something to become true.
func (e *env) until(what string, f func() bool) {
	e.awaited = what
	for !f() {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-e.ctx.Done():
			e.ok(e.ctx.Err())
		}
	}
	e.awaited = ""
}

// soon waits for a channel.
func soon[T any](e *env, what string, c <-chan T) T {
	select {
	case v := <-c:
		return v
	case <-e.ctx.Done():
		e.fail("never: %s", what)
		panic("not reached")
	}
}
