package agent_test

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// wireCalls are some of each kind: that ask, change, and wait for an event.
// (All of them meet scripted faults in pkg/agent.)
var wireCalls = map[string]func(context.Context, *agent.Client) error{
	"Check":         func(ctx context.Context, c *agent.Client) error { return c.Check(ctx) },
	"GuestDetails":  func(ctx context.Context, c *agent.Client) error { _, err := c.GuestDetails(ctx); return err },
	"StopContainer": func(ctx context.Context, c *agent.Client) error { return c.StopContainer(ctx, "nobody") },
	"StartSandbox": func(ctx context.Context, c *agent.Client) error {
		return c.StartSandbox(ctx, agent.Sandbox{Request: &protocol.CreateSandboxRequest{}})
	},
	"OOMEvent": func(ctx context.Context, c *agent.Client) error { _, err := c.OOMEvent(ctx); return err },
}

func wireSignal(t *testing.T, m *vmtest.Machine, role string, sig syscall.Signal) {
	t.Helper()
	for _, p := range m.Processes() {
		if p.Role == role {
			if err := syscall.Kill(p.PID, sig); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no %s among %v", role, m.Processes())
}

// A guest that stops while it is asked, goes on, and dies.
func TestVMWireFaults(t *testing.T) {
	for _, role := range []string{"qemu", "vhost-device-vsock"} {
		t.Run(role, func(t *testing.T) {
			m := vmtest.Boot(t)
			if role == "vhost-device-vsock" && len(m.Processes()) < 3 {
				t.Skip("the kernel carries vsock here")
			}
			c := agent.New(agent.Settings{Dial: m.Dial, URL: m.AgentURL(1024)})
			t.Cleanup(func() { c.MarkDead(errors.New("test is over")) })
			if err := c.Check(vmtest.Context(t)); err != nil {
				t.Fatal(err)
			}
			type result struct {
				name string
				err  error
				took time.Duration
			}
			begin := func(ctx context.Context) chan result {
				results := make(chan result, len(wireCalls))
				for name, call := range wireCalls {
					go func() {
						started := time.Now()
						err := call(ctx, c)
						results <- result{name, err, time.Since(started)}
					}()
				}
				return results
			}
			wireSignal(t, m, role, syscall.SIGSTOP)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			results := begin(ctx)
			for range wireCalls {
				if r := <-results; !errors.Is(r.err, context.DeadlineExceeded) || r.took > 5*time.Second {
					t.Errorf("%s of a stopped %s: %v after %v", r.name, role, r.err, r.took)
				}
			}
			wireSignal(t, m, role, syscall.SIGCONT)
			if err := c.Check(vmtest.Context(t)); err != nil { // behind all the late answers
				t.Errorf("a %s that goes on: %v", role, err)
			}

			wireSignal(t, m, role, syscall.SIGSTOP)
			results = begin(vmtest.Context(t))
			select {
			case r := <-results:
				t.Errorf("%s of a stopped %s ended: %v", r.name, role, r.err)
			case <-time.After(500 * time.Millisecond): // they are on their way
			}
			wireSignal(t, m, role, syscall.SIGKILL)
			died := time.Now()
			for range wireCalls {
				if r := <-results; !errors.Is(r.err, errdefs.ErrUnavailable) {
					t.Errorf("%s of a killed %s: %v", r.name, role, r.err)
				}
			}
			if d := time.Since(died); d > 5*time.Second {
				t.Errorf("calls took %v to notice", d)
			}
			<-m.Done()
			cause := errors.New("machine ended")
			c.MarkDead(cause)
			results = begin(vmtest.Context(t))
			for range wireCalls {
				if r := <-results; !errors.Is(r.err, cause) || !errors.Is(r.err, errdefs.ErrUnavailable) || r.took > time.Second {
					t.Errorf("%s of the dead: %v after %v", r.name, r.err, r.took)
				}
			}
		})
	}
}
