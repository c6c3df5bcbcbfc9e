package shim

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// maxEvents bounds the queue while containerd is away; the oldest go first.
	maxEvents = 4096
	// forwardTimeout bounds one try to hand over an event.
	forwardTimeout = 5 * time.Second
	// The pause between tries grows from the first to the second.
	minRetry, maxRetry = 50 * time.Millisecond, 2 * time.Second

	namespaceHeader = "containerd-namespace-ttrpc"
)

// A publisher hands events to containerd, in order, each until it is taken: a
// daemon that restarts under its containers loses none. Publishing never waits.
type publisher struct {
	address   string
	namespace string
	wake      chan struct{} // has room for one: there is something in the queue
	closing   chan struct{}
	cancel    context.CancelFunc
	done      chan struct{}

	mu    sync.Mutex
	queue []*types.Envelope // guarded by mu
}

// newPublisher starts the goroutine that close joins. Without an address
// events are dropped.
func newPublisher(ctx context.Context, address, namespace string) *publisher {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p := &publisher{
		address:   address,
		namespace: namespace,
		wake:      make(chan struct{}, 1),
		closing:   make(chan struct{}),
		cancel:    cancel,
		done:      make(chan struct{}),
	}
	go p.run(ctx)
	return p
}

// publish queues an event.
func (p *publisher) publish(ctx context.Context, event proto.Message) {
	if p.address == "" {
		return
	}
	value, err := proto.Marshal(event)
	if err != nil {
		log.G(ctx).WithError(err).Error("event not encoded")
		return
	}
	e := &types.Envelope{
		Timestamp: timestamppb.New(time.Now()),
		Namespace: p.namespace,
		Topic:     topic(event),
		Event:     &anypb.Any{TypeUrl: string(event.ProtoReflect().Descriptor().FullName()), Value: value},
	}
	p.mu.Lock()
	p.queue = append(p.queue, e)
	var dropped *types.Envelope
	if len(p.queue) > maxEvents {
		dropped, p.queue = p.queue[0], p.queue[1:]
	}
	p.mu.Unlock()
	if dropped != nil {
		log.G(ctx).WithField("topic", dropped.GetTopic()).Error("event dropped: containerd takes none")
	}
	select {
	case p.wake <- struct{}{}:
	default: // the goroutine will look anyway
	}
}

func topic(event proto.Message) string {
	switch event.(type) {
	case *events.TaskCreate:
		return "/tasks/create"
	case *events.TaskStart:
		return "/tasks/start"
	case *events.TaskOOM:
		return "/tasks/oom"
	case *events.TaskExit:
		return "/tasks/exit"
	case *events.TaskDelete:
		return "/tasks/delete"
	case *events.TaskExecAdded:
		return "/tasks/exec-added"
	case *events.TaskExecStarted:
		return "/tasks/exec-started"
	case *events.TaskPaused:
		return "/tasks/paused"
	case *events.TaskResumed:
		return "/tasks/resumed"
	}
	panic(fmt.Sprintf("no topic for event %T", event))
}

// close waits until the queue is empty or ctx ends.
func (p *publisher) close(ctx context.Context) {
	close(p.closing)
	select {
	case <-p.done:
	case <-ctx.Done():
		log.G(ctx).WithField("events", len(p.pending())).Error("events lost: containerd takes none")
		p.cancel()
		<-p.done
	}
	p.cancel()
}

func (p *publisher) pending() []*types.Envelope {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queue
}

// next waits for an event; nil when the publisher is closing and none is left.
func (p *publisher) next() *types.Envelope {
	for {
		if q := p.pending(); len(q) > 0 {
			return q[0]
		}
		select {
		case <-p.wake:
		case <-p.closing:
			if q := p.pending(); len(q) > 0 {
				return q[0]
			}
			return nil
		}
	}
}

// taken removes the event from the queue, unless it was dropped meanwhile.
func (p *publisher) taken(e *types.Envelope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) > 0 && p.queue[0] == e {
		p.queue = p.queue[1:]
	}
}

func (p *publisher) run(ctx context.Context) {
	defer close(p.done)
	var client *ttrpc.Client
	defer func() {
		if client != nil {
			_ = client.Close()
		}
	}()
	retry := minRetry
	for e := p.next(); e != nil; e = p.next() {
		err := p.forward(ctx, &client, e)
		if err == nil || refused(err) {
			if err != nil {
				log.G(ctx).WithError(err).WithField("topic", e.GetTopic()).Error("event refused by containerd")
			}
			p.taken(e)
			retry = minRetry
			continue
		}
		log.G(ctx).WithError(err).WithField("topic", e.GetTopic()).Debug("event not forwarded yet")
		select {
		case <-time.After(retry):
		case <-ctx.Done():
			return
		}
		retry = min(2*retry, maxRetry)
	}
}

// refused says that another try would not help.
func refused(err error) bool {
	return errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err)
}

// forward tries once, over a new connection when there is none.
func (p *publisher) forward(ctx context.Context, client **ttrpc.Client, e *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	if *client == nil {
		conn, err := dial(ctx, p.address)
		if err != nil {
			return err
		}
		*client = ttrpc.NewClient(conn)
	}
	ctx = ttrpc.WithMetadata(ctx, ttrpc.MD{namespaceHeader: []string{p.namespace}})
	_, err := eventsapi.NewTTRPCEventsClient(*client).Forward(ctx, &eventsapi.ForwardRequest{Envelope: e})
	if err == nil {
		return nil
	}
	err = errgrpc.ToNative(err)
	if !refused(err) {
		// Whatever it was, the next try begins afresh.
		err = errors.Join(err, (*client).Close())
		*client = nil
	}
	return err
}
