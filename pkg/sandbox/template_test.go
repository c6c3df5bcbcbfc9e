package sandbox

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
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
