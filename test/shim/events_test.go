package shim

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/emptypb"
)

// A sink takes events as containerd does.
type sink struct {
	testing.TB
	path   string
	ns     string
	server *ttrpc.Server

	mu   sync.Mutex
	got  []string // guarded by mu: kind, container, details
	read int      // guarded by mu: how many of them were asked for
	news chan struct{}
}

func newSink(tb testing.TB, path string) *sink {
	tb.Helper()
	s := &sink{TB: tb, path: path, ns: "ns", news: make(chan struct{}, 1)}
	s.up()
	tb.Cleanup(s.down)
	return s
}

func (s *sink) up() {
	s.Helper()
	_ = os.Remove(s.path)
	l, err := net.Listen("unix", s.path)
	if err != nil {
		s.Fatal(err)
	}
	if s.server, err = ttrpc.NewServer(); err != nil {
		s.Fatal(err)
	}
	eventsapi.RegisterTTRPCEventsService(s.server, s)
	server := s.server
	go func() { _ = server.Serve(context.WithoutCancel(s.Context()), l) }()
}

// down goes away between events: one whose answer is lost comes again.
func (s *sink) down() {
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	defer cancel()
	if err := s.server.Shutdown(ctx); err != nil {
		s.Errorf("events: %v", err)
	}
}

func (s *sink) Forward(_ context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	v, err := typeurl.UnmarshalAny(r.GetEnvelope().GetEvent())
	if err != nil {
		return nil, err
	}
	var text string
	switch v := v.(type) {
	case *events.TaskCreate:
		text = "create " + v.GetContainerID()
	case *events.TaskStart:
		text = "start " + v.GetContainerID()
	case *events.TaskExecAdded:
		text = fmt.Sprintf("exec-added %s %s", v.GetContainerID(), v.GetExecID())
	case *events.TaskExecStarted:
		text = fmt.Sprintf("exec-started %s %s", v.GetContainerID(), v.GetExecID())
	case *events.TaskExit:
		text = fmt.Sprintf("exit %s %s %d", v.GetContainerID(), v.GetID(), v.GetExitStatus())
	case *events.TaskOOM:
		text = "oom " + v.GetContainerID()
	case *events.TaskDelete:
		text = "delete " + v.GetContainerID()
	case *events.TaskPaused:
		text = "paused " + v.GetContainerID()
	case *events.TaskResumed:
		text = "resumed " + v.GetContainerID()
	default:
		text = fmt.Sprintf("%T", v)
	}
	if r.GetEnvelope().GetNamespace() != s.ns {
		text += " in namespace " + r.GetEnvelope().GetNamespace()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got = append(s.got, text)
	select {
	case s.news <- struct{}{}:
	default:
	}
	return &emptypb.Empty{}, nil
}

// next is the next event that was not asked for yet.
func (s *sink) next(tb testing.TB) string {
	tb.Helper()
	timeout := time.After(patience)
	for {
		s.mu.Lock()
		if s.read < len(s.got) {
			s.read++
			defer s.mu.Unlock()
			return s.got[s.read-1]
		}
		s.mu.Unlock()
		select {
		case <-s.news:
		case <-timeout:
			tb.Fatalf("no event; so far %q", s.all())
		}
	}
}

// want asserts the next events.
func (s *sink) want(tb testing.TB, want ...string) {
	tb.Helper()
	for _, w := range want {
		if got := s.next(tb); got != w {
			tb.Fatalf("event %q, want %q; all: %q", got, w, s.all())
		}
	}
}

// wantNoMore asserts that there are no others.
func (s *sink) wantNoMore(tb testing.TB) {
	tb.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.read < len(s.got) {
		tb.Errorf("more events: %q", s.got[s.read:])
	}
}

func (s *sink) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.got...)
}
