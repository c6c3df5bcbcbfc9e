package sandbox

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// What a guest has in common with others of its template is changed before there
// is a sandbox in it.
func TestRootRestored(t *testing.T) {
	e := newEnv(t)
	e.restored = true
	e.running()
	var asked []string
	for _, c := range e.peer.Calls("ReseedRandomDev", "SetGuestDateTime", "CreateSandbox") {
		asked = append(asked, c.Method)
	}
	if want := []string{"ReseedRandomDev", "SetGuestDateTime", "CreateSandbox"}; !slices.Equal(asked[:min(3, len(asked))], want) {
		t.Errorf("calls %v, want %v first", asked, want)
	}
	seed := e.peer.Calls("ReseedRandomDev")[0].Request.(*protocol.ReseedRandomDevRequest).GetData()
	if len(seed) != agent.SeedSize || bytes.Equal(seed, make([]byte, agent.SeedSize)) {
		t.Errorf("seed %x", seed)
	}
	set := e.peer.Calls("SetGuestDateTime")[0].Request.(*protocol.SetGuestDateTimeRequest)
	if off := time.Since(time.Unix(set.GetSec(), set.GetUsec()*1000)).Abs(); off > time.Minute {
		t.Errorf("the guest's clock is off by %v", off)
	}
}

// A guest that keeps what others know is not used.
func TestRootRestoredFails(t *testing.T) {
	for _, method := range []string{"ReseedRandomDev", "SetGuestDateTime"} {
		t.Run(method, func(t *testing.T) {
			e := newEnv(t)
			e.restored = true
			refused := errors.New("not today")
			switch method {
			case "ReseedRandomDev":
				agenttest.Handle(e.peer, method, func(context.Context, *protocol.ReseedRandomDevRequest) (*emptypb.Empty, error) { return nil, refused })
			default:
				agenttest.Handle(e.peer, method, func(context.Context, *protocol.SetGuestDateTimeRequest) (*emptypb.Empty, error) { return nil, refused })
			}
			err := e.sandbox().Start(t.Context(), testSpec())
			if err == nil || !strings.Contains(err.Error(), refused.Error()) {
				t.Errorf("start: %v", err)
			}
			if len(e.peer.Calls("CreateSandbox")) > 0 {
				t.Error("there is a sandbox")
			}
			e.clean()
		})
	}
}

// The first of a kind makes a template before its machine starts, if it can.
func TestRootMakeTemplate(t *testing.T) {
	refused := errors.New("no room")
	limit := int64(64 << 20)
	for name, tt := range map[string]struct {
		made  bool
		err   error
		limit *int64 // of memory: the machine is of another size
	}{
		"makes it":     {made: true},
		"there is one": {},
		"fails":        {err: refused},
		"with a limit": {limit: &limit},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			first := make(chan string, 1)
			e.point = func(what string) {
				select {
				case first <- what:
				default:
				}
			}
			e.opts.MakeTemplate = func(ctx context.Context, spec hypervisor.Spec, opts VMOptions) (bool, error) {
				e.point("make template")
				if spec.MemoryMiB != 256 || opts.Dir != e.opts.Dir || len(opts.Env) == 0 {
					t.Errorf("machine %+v, %+v", spec, opts)
				}
				if _, ok := ctx.Deadline(); !ok {
					t.Error("it may take for ever")
				}
				if !tt.made && tt.err == nil {
					return false, nil
				}
				m, err := e.start(ctx, spec, opts)
				if err != nil {
					t.Fatal(err)
				}
				_ = m.Kill()
				return tt.made, tt.err
			}
			s := e.sandbox()
			spec := testSpec()
			if tt.limit != nil {
				spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: tt.limit}}
			}
			if err := s.Start(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			want := "make template"
			if tt.limit != nil {
				want = "start machine"
			}
			if did := <-first; did != want {
				t.Errorf("the first that it did was to %s", did)
			}
			st, err := ReadState(e.opts.Dir)
			if err != nil {
				t.Fatal(err)
			}
			if len(st.Processes) != 1 || st.Processes[0] != e.machine().proc {
				t.Errorf("state has the processes %v", st.Processes)
			}
			if marked := slices.ContainsFunc(st.Timeline, func(p Phase) bool { return p.Name == PhaseTemplate }); marked != tt.made {
				t.Errorf("time line %v", st.Timeline)
			}
			if err := s.Stop(t.Context()); err != nil {
				t.Error(err)
			}
			e.clean()
		})
	}
}

// A sandbox that is stopped does not wait for its template.
func TestRootMakeTemplateStopped(t *testing.T) {
	e := newEnv(t)
	making := make(chan struct{})
	e.opts.MakeTemplate = func(ctx context.Context, _ hypervisor.Spec, _ VMOptions) (bool, error) {
		close(making)
		<-ctx.Done()
		return false, context.Cause(ctx)
	}
	s := e.sandbox()
	failed := make(chan error, 1)
	go func() { failed <- s.Start(t.Context(), testSpec()) }()
	ended(t, "the way to the template", making)
	if err := s.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	fails(t, <-failed, errStopped)
	if len(e.machines) > 0 {
		t.Error("a machine was started")
	}
	e.clean()
}
