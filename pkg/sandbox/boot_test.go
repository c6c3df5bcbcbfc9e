package sandbox

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A still machine does nothing by itself.
type still struct{ ready, done chan struct{} }

func (m still) Ready() <-chan struct{}                       { return m.ready }
func (m still) Done() <-chan struct{}                        { return m.done }
func (still) Dial(context.Context, uint32) (net.Conn, error) { return nil, errors.New("still") }
func (still) AgentURL(uint32) string                         { return "" }
func (still) Err() error                                     { return nil }
func (still) Shutdown(context.Context) error                 { return nil }
func (still) Kill() error                                    { return nil }
func (still) Console() string                                { return "console" }
func (still) Processes() []hypervisor.Process                { return nil }
func (still) Examine()                                       {}
func (still) Restored() bool                                 { return false }
func (still) UnplugNIC(context.Context, string) error        { return nil }
func (still) PlugNIC(context.Context, hypervisor.NIC, []*os.File, []*os.File) (string, error) {
	return "", nil
}

// TestAwaitAgent has an agent that does not say that it serves.
func TestAwaitAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := still{make(chan struct{}), make(chan struct{})}
		begun := time.Now()
		asked := 0
		err := awaitAgent(t.Context(), m, func(ctx context.Context) error {
			asked++
			if time.Since(begun) > 20*time.Second {
				return nil
			}
			<-ctx.Done() // nobody answers
			return errors.New("no answer")
		})
		if d := time.Since(begun); err != nil || d > 30*time.Second || asked < 3 || asked > 7 {
			t.Errorf("asked %d times in %v: %v", asked, d, err)
		}
	})
	for name, tt := range map[string]struct {
		do   func(m still, cancel context.CancelCauseFunc)
		want string
	}{
		"ready":     {func(m still, _ context.CancelCauseFunc) { close(m.ready) }, ""},
		"gone":      {func(m still, _ context.CancelCauseFunc) { close(m.done) }, "machine is gone"},
		"cancelled": {func(_ still, cancel context.CancelCauseFunc) { cancel(errors.New("no more")) }, "no more; last: it was not asked yet; console: console"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := still{make(chan struct{}), make(chan struct{})}
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				time.AfterFunc(time.Second, func() { tt.do(m, cancel) })
				err := awaitAgent(ctx, m, func(context.Context) error {
					t.Error("asked too early")
					return nil
				})
				if tt.want == "" && err != nil {
					t.Error(err)
				} else if tt.want != "" {
					fails(t, err, nil, tt.want)
				}
			})
		})
	}
}
