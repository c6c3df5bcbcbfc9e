package shim

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// A listener of events, as containerd is.
type eventSink struct {
	path   string
	server *ttrpc.Server

	mu   sync.Mutex
	got  []string      // guarded by mu: topic, container, details
	news chan struct{} // has room for one
	hang chan struct{} // not nil: Forward waits for it
	err  error         // of Forward, once
}

func newEventSink(tb testing.TB) *eventSink {
	tb.Helper()
	s := &eventSink{path: filepath.Join(tb.TempDir(), "e"), news: make(chan struct{}, 1)}
	s.serve(tb)
	tb.Cleanup(func() { s.stop() })
	return s
}

func (s *eventSink) serve(tb testing.TB) {
	tb.Helper()
	_ = os.Remove(s.path)
	l, err := net.Listen("unix", s.path)
	if err != nil {
		tb.Fatal(err)
	}
	s.server, err = ttrpc.NewServer()
	if err != nil {
		tb.Fatal(err)
	}
	eventsapi.RegisterTTRPCEventsService(s.server, s)
	go func() { _ = s.server.Serve(context.WithoutCancel(tb.Context()), l) }()
}

func (s *eventSink) stop() { _ = s.server.Close() }

func (s *eventSink) Forward(ctx context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	hang, err := s.hang, s.err
	s.err = nil
	s.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if err != nil {
		return nil, err
	}
	e := r.GetEnvelope()
	v, err := typeurl.UnmarshalAny(e.GetEvent())
	if err != nil {
		return nil, err
	}
	text := e.GetTopic() + " " + v.(interface{ GetContainerID() string }).GetContainerID()
	switch v := v.(type) {
	case *events.TaskExit:
		text += fmt.Sprintf(" %s %d", v.GetID(), v.GetExitStatus())
	case *events.TaskExecStarted:
		text += " " + v.GetExecID()
	case *events.TaskExecAdded:
		text += " " + v.GetExecID()
	}
	if ns, _ := ttrpc.GetMetadataValue(ctx, namespaceHeader); ns != e.GetNamespace() || ns == "" || e.GetTimestamp() == nil {
		text += fmt.Sprintf(" BAD ENVELOPE %v", e)
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

// all are the events so far. One may come twice: a daemon that ends after it
// took the event and before it said so cannot be told from one that did not.
func (s *eventSink) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Compact(slices.Clone(s.got))
}

// want waits until exactly these events were received.
func (s *eventSink) want(tb testing.TB, want ...string) {
	tb.Helper()
	timeout := time.After(20 * time.Second)
	for len(s.all()) < len(want) {
		select {
		case <-s.news:
		case <-timeout:
			tb.Fatalf("events:\n got %q\nwant %q", s.all(), want)
		}
	}
	if got := s.all(); !slices.Equal(got, want) {
		tb.Errorf("events:\n got %q\nwant %q", got, want)
	}
}

func closePublisher(tb testing.TB, p *publisher, d time.Duration) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(tb.Context()), d)
	defer cancel()
	soon(tb, "close publisher", func() { p.close(ctx) })
}

func TestPublisher(t *testing.T) {
	s := newEventSink(t)
	p := newPublisher(t.Context(), s.path, "ns")
	p.publish(t.Context(), &events.TaskCreate{ContainerID: "c"})
	p.publish(t.Context(), &events.TaskStart{ContainerID: "c"})
	s.want(t, "/tasks/create c", "/tasks/start c")

	s.stop() // containerd restarts
	p.publish(t.Context(), &events.TaskOOM{ContainerID: "c"})
	p.publish(t.Context(), &events.TaskExit{ContainerID: "c", ID: "x", ExitStatus: 137})
	time.Sleep(100 * time.Millisecond)
	s.serve(t)
	s.want(t, "/tasks/create c", "/tasks/start c", "/tasks/oom c", "/tasks/exit c x 137")

	// One that containerd does not take does not stop the others.
	s.mu.Lock()
	s.err = status.Error(codes.InvalidArgument, "no")
	s.mu.Unlock()
	p.publish(t.Context(), &events.TaskPaused{ContainerID: "c"})
	p.publish(t.Context(), &events.TaskResumed{ContainerID: "c"})
	p.publish(t.Context(), &events.TaskDelete{ContainerID: "c"})
	closePublisher(t, p, 10*time.Second) // and waits for all of them
	s.want(t, "/tasks/create c", "/tasks/start c", "/tasks/oom c", "/tasks/exit c x 137",
		"/tasks/resumed c", "/tasks/delete c")
}

func TestPublisherAlone(t *testing.T) {
	t.Run("nobody there", func(t *testing.T) {
		p := newPublisher(t.Context(), filepath.Join(t.TempDir(), "none"), "ns")
		for range maxEvents + 10 {
			p.publish(t.Context(), &events.TaskOOM{ContainerID: "c"})
		}
		if n := len(p.pending()); n != maxEvents {
			t.Errorf("%d events queued, want %d", n, maxEvents)
		}
		closePublisher(t, p, 100*time.Millisecond)
	})
	t.Run("no address", func(t *testing.T) {
		p := newPublisher(t.Context(), "", "ns")
		p.publish(t.Context(), &events.TaskOOM{ContainerID: "c"})
		closePublisher(t, p, 10*time.Second)
	})
	t.Run("hangs", func(t *testing.T) {
		s := newEventSink(t)
		s.hang = make(chan struct{})
		p := newPublisher(t.Context(), s.path, "ns")
		p.publish(t.Context(), &events.TaskOOM{ContainerID: "c"})
		closePublisher(t, p, 200*time.Millisecond)
		close(s.hang)
	})
}

func TestTopics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("an event without a topic is not noticed")
		}
	}()
	topic(&events.ContainerCreate{})
}
