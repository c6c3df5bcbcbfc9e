package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
)

// hookPoints makes hooks that report to point by a fifo, and wait for its
// answer.
func hookPoints(t *testing.T, point func(string)) *specs.Hooks {
	t.Helper()
	dir := t.TempDir()
	hook := func(name string) []specs.Hook {
		for _, fifo := range []string{".in", ".out"} {
			if err := syscall.Mkfifo(filepath.Join(dir, name+fifo), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		in, err := os.OpenFile(filepath.Join(dir, name+".in"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.OpenFile(filepath.Join(dir, name+".out"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				if _, err := in.Read(make([]byte, 2)); err != nil {
					return
				}
				point("hook " + name)
				_, _ = out.WriteString("\n")
			}
		}()
		t.Cleanup(func() {
			_ = in.Close()
			<-done
			_ = out.Close()
		})
		return []specs.Hook{{
			Path: "/bin/sh", Args: []string{"sh", "-c", fmt.Sprintf("echo >%[1]s.in; read x <%[1]s.out", filepath.Join(dir, name))},
			Env: []string{"PATH=/bin:/usr/bin"},
		}}
	}
	return &specs.Hooks{
		Prestart:      hook("prestart"), //nolint:staticcheck // deprecated, and still used
		CreateRuntime: hook("createRuntime"),
		Poststart:     hook("poststart"), Poststop: hook("poststop"),
	}
}

// TestRootCancelAtEveryStep cancels a start and a creation beside it at each
// step that can be seen from outside: nothing is left.
func TestRootCancelAtEveryStep(t *testing.T) {
	for n := 1; ; n++ {
		reached := ""
		t.Run(fmt.Sprint(n), func(t *testing.T) { reached = cancelAt(t, int64(n)) })
		if t.Failed() {
			return
		}
		if reached == "" {
			if n < 12 {
				t.Errorf("only %d steps", n)
			}
			return
		}
		t.Logf("%d: %s", n, reached)
	}
}

// cancelAt cancels at the nth step, and names it.
func cancelAt(t *testing.T, n int64) (reached string) {
	e := newEnv(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var step atomic.Int64
	var at atomic.Value
	e.point = func(what string) { // also when all went well, and nobody looks any more
		if step.Add(1) == n {
			at.Store(what)
			cancel()
		}
	}
	cfg := e.config("c1")
	cfg.Spec.Hooks = hookPoints(t, e.point)
	s := e.sandbox()
	var g errgroup.Group
	var c *Container
	var started, created error
	g.Go(func() error { started = s.Start(ctx, cfg.Spec); return nil })
	g.Go(func() error { c, created = s.CreateContainer(ctx, cfg); return nil })
	begun := time.Now()
	_ = g.Wait()
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("took %v", d)
	}
	if reached, _ = at.Load().(string); reached == "" { // all went well
		if err := errors.Join(started, created); err != nil {
			t.Error(err)
		}
	} else if started == nil && created == nil && c == nil {
		t.Error("neither failed")
	}
	if started != nil {
		fails(t, started, context.Canceled)
		e.clean()
	} else if created != nil {
		fails(t, created, context.Canceled)
		e.nothingOf("c1")
	}
	if err := s.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	e.clean()
	return reached
}

// TestRootStopAtAnyTime stops while the others run.
func TestRootStopAtAnyTime(t *testing.T) {
	for delay := time.Duration(0); delay < 60*time.Millisecond; delay += 4 * time.Millisecond {
		e := newEnv(t)
		s := e.sandbox()
		var g errgroup.Group
		g.Go(func() error { _ = s.Start(t.Context(), testSpec()); return nil })
		g.Go(func() error {
			c, err := s.CreateContainer(t.Context(), e.config("c1"))
			if err == nil {
				_ = c.Start(t.Context())
				ended(t, "process", c.Init().Done())
			}
			return nil
		})
		time.Sleep(delay)
		if err := s.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		_ = g.Wait()
		e.clean()
	}
}
