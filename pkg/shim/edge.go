package shim

import (
	"context"
	"errors"
	"path"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
)

// The task API has two names for one wire format: the messages of version 2 and
// 3 are the same field by field (tested), so one table serves both.
const (
	taskService2 = "containerd.task.v2.Task"
	taskService3 = "containerd.task.v3.Task"
)

func (s *service) register(server *ttrpc.Server) {
	table := &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State":      method(s.State),
		"Create":     method(changing(s, s.Create)),
		"Start":      method(changing(s, s.Start)),
		"Delete":     method(changing(s, s.Delete)),
		"Pids":       method(s.Pids),
		"Pause":      method(changing(s, s.Pause)),
		"Resume":     method(changing(s, s.Resume)),
		"Checkpoint": method(s.Checkpoint),
		"Kill":       method(s.Kill),
		"Exec":       method(changing(s, s.Exec)),
		"ResizePty":  method(s.ResizePty),
		"CloseIO":    method(s.CloseIO),
		"Update":     method(changing(s, s.Update)),
		"Wait":       method(s.Wait),
		"Stats":      method(s.Stats),
		"Connect":    method(s.Connect),
		"Shutdown":   method(s.Shutdown),
	}}
	server.RegisterService(taskService2, table)
	server.RegisterService(taskService3, table)
}

var _ taskapi.TTRPCTaskService = (*service)(nil)

// method makes a table entry of a call. Here the ids are put on the context.
func method[Req, Resp any](call func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := new(Req)
		if err := unmarshal(req); err != nil {
			return nil, err
		}
		return call(log.WithLogger(ctx, log.G(ctx).WithFields(ids(req))), req)
	}
}

// ids are what a request says of whom it is about.
func ids(req any) log.Fields {
	fields := log.Fields{}
	if r, ok := req.(interface{ GetID() string }); ok && r.GetID() != "" {
		fields["container_id"] = r.GetID()
	}
	if r, ok := req.(interface{ GetSandboxID() string }); ok && r.GetSandboxID() != "" {
		fields["sandbox_id"] = r.GetSandboxID()
	}
	if r, ok := req.(interface{ GetExecID() string }); ok && r.GetExecID() != "" {
		fields["exec_id"] = r.GetExecID()
	}
	return fields
}

// changing wraps a call that the end of the daemon cancels and waits for.
func changing[Req, Resp any](s *service, call func(context.Context, *Req) (*Resp, error)) func(context.Context, *Req) (*Resp, error) {
	return func(ctx context.Context, req *Req) (*Resp, error) {
		ctx, end, err := s.begin(ctx)
		if err != nil {
			return nil, err
		}
		defer end()
		return call(ctx, req)
	}
}

// edge is where errors leave: logged once, with a class that containerd knows.
func edge(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, call ttrpc.Method) (any, error) {
	var req any
	resp, err := call(ctx, func(v any) error {
		req = v
		return unmarshal(v)
	})
	if err == nil {
		return resp, nil
	}
	entry := log.G(ctx).WithError(err).WithField("method", info.FullMethod).WithFields(ids(req))
	if usual(err) && path.Base(info.FullMethod) != "Create" {
		entry.Debug("call refused")
	} else {
		entry.Error("call failed")
	}
	return nil, errgrpc.ToGRPC(err)
}

// usual says that the error is an answer to a call that came at the wrong
// time, nothing for an operator.
func usual(err error) bool {
	return errdefs.IsNotFound(err) || errdefs.IsAlreadyExists(err) || errdefs.IsFailedPrecondition(err) ||
		errdefs.IsNotImplemented(err) || errors.Is(err, context.Canceled)
}
