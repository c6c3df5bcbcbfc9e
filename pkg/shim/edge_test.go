package shim

import (
	"context"
	"errors"
	"fmt"
	"testing"

	task2 "github.com/containerd/containerd/api/runtime/task/v2"
	task3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// One table serves both versions because their messages are the same on the wire.
func TestTaskVersions(t *testing.T) {
	s2 := task2.File_runtime_task_v2_shim_proto.Services().ByName("Task").Methods()
	s3 := task3.File_runtime_task_v3_shim_proto.Services().ByName("Task").Methods()
	if s2.Len() != s3.Len() {
		t.Errorf("version 2 has %d methods, version 3 %d", s2.Len(), s3.Len())
	}
	for i := range s3.Len() {
		m3 := s3.Get(i)
		m2 := s2.ByName(m3.Name())
		if m2 == nil {
			t.Errorf("%s is new in version 3", m3.Name())
			continue
		}
		sameMessage(t, m2.Input(), m3.Input())
		sameMessage(t, m2.Output(), m3.Output())
	}
}

func sameMessage(t *testing.T, a, b protoreflect.MessageDescriptor) {
	t.Helper()
	if a.Fields().Len() != b.Fields().Len() {
		t.Errorf("%s: %d and %d fields", a.Name(), a.Fields().Len(), b.Fields().Len())
	}
	for i := range a.Fields().Len() {
		fa := a.Fields().Get(i)
		fb := b.Fields().ByNumber(fa.Number())
		if fb == nil || fa.Name() != fb.Name() || fa.Kind() != fb.Kind() || fa.Cardinality() != fb.Cardinality() {
			t.Errorf("%s: %v and %v", a.Name(), fa, fb)
		} else if m := fa.Message(); m != nil && m.FullName() != fb.Message().FullName() && !m.IsMapEntry() {
			t.Errorf("%s.%s: %s and %s", a.Name(), fa.Name(), m.FullName(), fb.Message().FullName())
		}
	}
}

func TestEdge(t *testing.T) {
	info := &ttrpc.UnaryServerInfo{FullMethod: "/containerd.task.v3.Task/State"}
	unmarshal := func(any) error { return nil }
	for _, c := range []struct {
		err   error
		class func(error) bool
		usual bool
	}{
		{fmt.Errorf("x: %w", errdefs.ErrNotFound), errdefs.IsNotFound, true},
		{fmt.Errorf("x: %w", errdefs.ErrAlreadyExists), errdefs.IsAlreadyExists, true},
		{fmt.Errorf("x: %w", errdefs.ErrFailedPrecondition), errdefs.IsFailedPrecondition, true},
		{fmt.Errorf("x: %w", errdefs.ErrNotImplemented), errdefs.IsNotImplemented, true},
		{fmt.Errorf("x: %w", errdefs.ErrUnavailable), errdefs.IsUnavailable, false},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), errdefs.IsDeadlineExceeded, false},
		{errors.New("x"), errdefs.IsUnknown, false},
	} {
		call := method(func(context.Context, *task3.StateRequest) (*task3.StateResponse, error) { return nil, c.err })
		_, err := edge(t.Context(), unmarshal, info, call)
		if got := errgrpc.ToNative(err); !c.class(got) {
			t.Errorf("%v becomes %v", c.err, got)
		}
		if usual(c.err) != c.usual {
			t.Errorf("usual(%v) = %v", c.err, !c.usual)
		}
	}
	want := &task3.StateResponse{ID: "a"}
	call := method(func(_ context.Context, r *task3.StateRequest) (*task3.StateResponse, error) { return want, nil })
	if got, err := edge(t.Context(), unmarshal, info, call); got != want || err != nil {
		t.Errorf("got %v, %v", got, err)
	}
}
