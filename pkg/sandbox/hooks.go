package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// hookTail is how much of a hook's stderr its error has.
	hookTail = 4 << 10
	// hookLinger is how long the streams of a hook may outlive it, in a child
	// that it left behind.
	hookLinger = time.Second
)

// hookState is what hooks read: the state of the container, as OCI defines it.
func hookState(spec *specs.Spec, id, bundle string, status specs.ContainerState, pid int) *specs.State {
	return &specs.State{
		Version: spec.Version, ID: id, Status: status, Pid: pid, Bundle: bundle, Annotations: spec.Annotations,
	}
}

// runHooks runs hooks one after the other, up to the first that fails.
func runHooks(ctx context.Context, kind string, hooks []specs.Hook, state *specs.State, timeout time.Duration) error {
	if len(hooks) == 0 {
		return nil
	}
	input, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("%s hooks: %w", kind, err)
	}
	for i, h := range hooks {
		if err := runHook(ctx, h, state.Bundle, input, timeout); err != nil {
			return fmt.Errorf("%s hook %d %q: %w", kind, i, h.Path, err)
		}
	}
	return nil
}

// tryHooks runs every hook, whatever the others did, and logs failures: OCI
// wants no more of those that run after the fact.
func tryHooks(ctx context.Context, kind string, hooks []specs.Hook, state *specs.State, timeout time.Duration) {
	for _, h := range hooks {
		if err := runHooks(ctx, kind, []specs.Hook{h}, state, timeout); err != nil {
			log.G(ctx).WithError(err).Warn("hook failed")
		}
	}
}

func runHook(ctx context.Context, h specs.Hook, dir string, input []byte, timeout time.Duration) error {
	if h.Timeout != nil {
		timeout = time.Duration(*h.Timeout) * time.Second
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no end after %v: %w", timeout, context.DeadlineExceeded))
	defer cancel()
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env, cmd.Dir = hookEnv(h.Env), dir
	cmd.Stdin = bytes.NewReader(input)
	var stderr tail
	cmd.Stderr = &stderr
	// Its children as well: a shell does not pass the signal on.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = hookLinger

	err := cmd.Run()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	if text := stderr.String(); text != "" {
		return fmt.Errorf("%w: %q", err, text)
	}
	return err
}

// hookEnv is the hook's own environment. Without one it is ours, as other
// runtimes do, but for the mark: what a hook leaves behind may outlive the
// sandbox.
func hookEnv(env []string) []string {
	if env != nil {
		return env
	}
	env = []string{}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, EnvMark+"=") {
			env = append(env, v)
		}
	}
	return env
}

// A tail keeps the last bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - hookTail; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.TrimSpace(string(t.b)) }
