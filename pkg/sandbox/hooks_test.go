package sandbox

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func sh(script string) specs.Hook {
	return specs.Hook{Path: "/bin/sh", Args: []string{"hook", "-c", script}}
}

func TestHooks(t *testing.T) {
	dir := t.TempDir()
	state := &specs.State{
		Version: "1.2.0", ID: "c1", Status: specs.StateCreating, Pid: 7, Bundle: dir, Annotations: map[string]string{"a": "b"},
	}
	t.Setenv(EnvMark, "/somewhere")
	t.Setenv("INHERITED", "yes")
	own := sh(`echo "$OWN,$INHERITED" >own`)
	own.Env = []string{"OWN=1", "PATH=/bin"}
	err := runHooks(t.Context(), "prestart", []specs.Hook{
		sh("cat >state"), sh(`echo "$INHERITED,$` + EnvMark + `,$0" >env`), own,
	}, state, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var got specs.State
	b, err := os.ReadFile(filepath.Join(dir, "state"))
	if err == nil {
		err = json.Unmarshal(b, &got)
	}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(*state, got); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]string{"env": "yes,,hook\n", "own": "1,\n"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); string(b) != want {
			t.Errorf("%s has %q, want %q: %v", name, b, want, err)
		}
	}
}

func TestHooksFail(t *testing.T) {
	state := &specs.State{Bundle: t.TempDir()}
	err := runHooks(t.Context(), "createRuntime", []specs.Hook{sh("true"), sh("echo no network >&2; exit 3"), sh("touch third")}, state, time.Minute)
	fails(t, err, nil, `createRuntime hook 1 "/bin/sh": exit status 3: "no network"`)
	if _, err := os.Stat(filepath.Join(state.Bundle, "third")); err == nil {
		t.Error("the hook behind the one that failed ran")
	}
	tryHooks(t.Context(), "poststop", []specs.Hook{sh("exit 1"), sh("touch third")}, state, time.Minute)
	if _, err := os.Stat(filepath.Join(state.Bundle, "third")); err != nil {
		t.Error(err)
	}
	err = runHooks(t.Context(), "prestart", []specs.Hook{{Path: "/nowhere"}}, state, time.Minute)
	fails(t, err, os.ErrNotExist, "/nowhere")
}

func TestHooksEndInTime(t *testing.T) {
	state := &specs.State{Bundle: t.TempDir()}
	start := time.Now()
	slow := sh("sleep 1000; true")
	err := runHooks(t.Context(), "prestart", []specs.Hook{slow}, state, 50*time.Millisecond)
	fails(t, err, context.DeadlineExceeded, "no end after 50ms")

	slow.Timeout = new(0)
	fails(t, runHooks(t.Context(), "prestart", []specs.Hook{slow}, state, time.Minute), context.DeadlineExceeded, "no end after 0s")

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	slow.Timeout = new(1000)
	fails(t, runHooks(ctx, "prestart", []specs.Hook{slow}, state, time.Minute), context.DeadlineExceeded)

	// What a hook leaves behind has its stderr, and is not waited for.
	if err := runHooks(t.Context(), "prestart", []specs.Hook{sh("sleep 5 & true")}, state, time.Minute); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > 4*time.Second {
		t.Errorf("took %v", d)
	}
}

func TestTail(t *testing.T) {
	var tl tail
	for range 10 {
		if _, err := tl.Write(make([]byte, hookTail/2)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tl.Write([]byte("end")); err != nil {
		t.Fatal(err)
	}
	if s := string(tl.b); len(s) != hookTail || s[len(s)-3:] != "end" {
		t.Errorf("%d bytes, %q", len(s), s[len(s)-3:])
	}
}
