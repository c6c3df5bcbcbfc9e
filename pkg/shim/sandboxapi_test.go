package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
)

// netns is a network namespace, which a process keeps.
func (e *env) netns() string {
	e.Helper()
	holder := exec.Command("sleep", "1000")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := holder.Start(); err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() {
		_ = holder.Process.Kill()
		_ = holder.Wait()
	})
	return fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid)
}

// startSandbox makes the sandbox "pod" through the API.
func (e *env) startSandbox() {
	e.Helper()
	bundle := filepath.Join(e.dir, "b-pod")
	if err := os.MkdirAll(bundle, 0o755); err != nil {
		e.Fatal(err)
	}
	config := &runtimeapi.PodSandboxConfig{Hostname: "name"}
	t := e.TB.(*testing.T)
	if _, err := e.svc.CreateSandbox(e.Context(), &sandboxapi.CreateSandboxRequest{
		SandboxID: "pod", BundlePath: bundle, NetnsPath: e.netns(), Options: podOptions(t, config),
	}); err != nil {
		e.Fatal(err)
	}
	resp, err := e.svc.StartSandbox(e.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	if err != nil {
		e.Fatal(err)
	}
	if resp.GetPid() == 0 || resp.GetCreatedAt() == nil {
		e.Errorf("started as %v", resp)
	}
}

func (e *env) sandboxState() *sandboxapi.SandboxStatusResponse {
	e.Helper()
	st, err := e.svc.SandboxStatus(e.Context(), &sandboxapi.SandboxStatusRequest{SandboxID: "pod", Verbose: true})
	if err != nil {
		e.Fatal(err)
	}
	return st
}

func member(spec *specs.Spec) {
	spec.Annotations = map[string]string{
		"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod",
	}
}

func TestSandboxAPI(t *testing.T) {
	e := newEnv(t, func(ctx context.Context, _ *agenttest.Process) int {
		<-ctx.Done()
		return 0
	})
	e.startSandbox()
	if st := e.sandboxState(); st.GetState() != stateReady || st.GetPid() == 0 || st.GetInfo()["directory"] == "" {
		t.Errorf("status %v", st)
	}
	if _, err := e.svc.PingSandbox(t.Context(), &sandboxapi.PingRequest{SandboxID: "pod"}); err != nil {
		t.Error(err)
	}
	if p, err := e.svc.Platform(t.Context(), &sandboxapi.PlatformRequest{}); err != nil || p.GetPlatform().GetOS() != "linux" ||
		p.GetPlatform().GetArchitecture() != runtime.GOARCH {
		t.Errorf("platform %v, %v", p, err)
	}
	if m, err := e.svc.SandboxMetrics(t.Context(), &sandboxapi.SandboxMetricsRequest{SandboxID: "pod"}); err != nil || m.GetMetrics().GetData() == nil {
		t.Errorf("metrics %v, %v", m, err)
	}
	// The sandbox is no task.
	if _, err := e.svc.State(t.Context(), &taskapi.StateRequest{ID: "pod"}); !errdefs.IsNotFound(err) {
		t.Errorf("state of the sandbox as a task: %v", err)
	}
	// It lives on without containers, and takes others.
	for _, id := range []string{"a", "b"} {
		if err := e.create(id, member); err != nil {
			t.Fatal(err)
		}
		if text, err := os.ReadFile(filepath.Join(e.sandboxState().GetInfo()["directory"], "share", id, "rootfs", "etc/hosts")); err == nil {
			t.Errorf("the root file system was written to: %q", text)
		}
		if _, err := e.Delete(t.Context(), &taskapi.DeleteRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
		if _, err := e.Shutdown(t.Context(), &taskapi.ShutdownRequest{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-e.svc.done:
		t.Fatal("the end of the tasks ended the sandbox")
	default:
	}
	waited := make(chan *sandboxapi.WaitSandboxResponse, 1)
	go func() {
		resp, err := e.svc.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "pod"})
		if err != nil {
			t.Error(err)
		}
		waited <- resp
	}()
	if _, err := e.svc.StopSandbox(t.Context(), &sandboxapi.StopSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Fatal(err)
	}
	soon(t, "wait for the sandbox", func() {
		if resp := <-waited; resp.GetExitStatus() != 0 || resp.GetExitedAt() == nil {
			t.Errorf("ended with %v", resp)
		}
	})
	if st := e.sandboxState(); st.GetState() != stateNotReady || st.GetExitedAt() == nil {
		t.Errorf("status after the stop %v", st)
	}
	if _, err := e.svc.StopSandbox(t.Context(), &sandboxapi.StopSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Errorf("second stop: %v", err)
	}
	if left := e.left("vm"); left != "" {
		t.Errorf("left after the stop: %s", left)
	}
	if _, err := e.svc.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Error(err)
	}
	select {
	case <-e.svc.done:
	default:
		t.Error("the daemon lives on")
	}
}

// As containerd tells of a pod's resize.
func TestSandboxAPIUpdate(t *testing.T) {
	e := newEnv(t, nil)
	e.startSandbox()
	update := func(value string, fields ...string) error {
		_, err := e.svc.UpdateSandbox(t.Context(), &sandboxapi.UpdateSandboxRequest{
			SandboxID: "pod", Fields: fields,
			Sandbox: &types.Sandbox{Extensions: map[string]*anypb.Any{
				"metadata":          {TypeUrl: "x", Value: []byte("{}")},
				"updated-resources": {TypeUrl: "io.containerd.cri.v1/UpdatedResources", Value: []byte(value)},
			}},
		})
		return err
	}
	e.mu.Lock()
	m := e.machine
	e.mu.Unlock()
	const resources = `{"Overhead":{"memory_limit_in_bytes":7340032},"Resources":{"memory_limit_in_bytes":33554432}}`
	if err := errors.Join(update(resources, "labels"), update(`{"Overhead":{},"Resources":null}`, "extensions")); err != nil {
		t.Error(err)
	}
	select {
	case size := <-m.sizes:
		t.Errorf("the machine has %s after what says nothing of resources", size)
	default:
	}
	for _, fields := range [][]string{{"labels", "extensions"}, nil} {
		if err := update(resources, fields...); err != nil {
			t.Fatal(err)
		}
	}
	if size := <-m.sizes; size != "288 MiB" || len(m.sizes) > 0 {
		t.Errorf("the machine has %s, then %d other sizes", size, len(m.sizes))
	}
	if err := update("no JSON", "extensions"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("update with garbage: %v", err)
	}
	if _, err := e.svc.StopSandbox(t.Context(), &sandboxapi.StopSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Fatal(err)
	}
	if err := update(resources); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("update after the stop: %v", err)
	}
}

// The options of a runtime come with start, from every generation of containerd.
func TestSandboxAPIOptions(t *testing.T) {
	options, err := typeurl.MarshalAnyToProto(&runtimeoptions.Options{ConfigPath: "/nonexistent/handler.toml"})
	if err != nil {
		t.Fatal(err)
	}
	for _, generation := range []string{"2.2", "2.3"} {
		t.Run(generation, func(t *testing.T) {
			b := newBundle(t, "pod", nil)
			stdin, err := proto.Marshal(options)
			if generation == "2.3" {
				params := b.params()
				params.Extensions = []*bootapi.Extension{{Value: &anypb.Any{TypeUrl: "x"}}, {Value: options}}
				stdin, err = proto.Marshal(params)
			}
			if err != nil {
				t.Fatal(err)
			}
			out, _, err := b.call(stdin, true, "start")
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			address := readAddress(b.dir)
			conn, err := dial(t.Context(), address)
			if err != nil {
				t.Fatal(err)
			}
			client := ttrpc.NewClient(conn)
			defer client.Close()
			api := sandboxapi.NewTTRPCSandboxClient(client)
			if _, err := api.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{
				SandboxID: "pod", BundlePath: b.dir, NetnsPath: "/nonexistent/netns",
			}); err != nil {
				t.Fatal(err)
			}
			_, err = api.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
			if err == nil || !strings.Contains(err.Error(), "/nonexistent/handler.toml") {
				t.Errorf("start with a configuration that is not there: %v", err)
			}
			if _, err := api.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"}); err != nil {
				t.Error(err)
			}
			b.delete()
			b.wantNothingLeft(address)
		})
	}
}

func TestSandboxAPIMachineEnds(t *testing.T) {
	e := newEnv(t, func(ctx context.Context, _ *agenttest.Process) int {
		<-ctx.Done()
		return 0
	})
	e.startSandbox()
	e.killMachine()
	soon(t, "wait for the sandbox", func() {
		resp, err := e.svc.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "pod"})
		if err != nil || resp.GetExitStatus() != 137 {
			t.Errorf("ended with %v, %v", resp, err)
		}
	})
	if _, err := e.svc.PingSandbox(t.Context(), &sandboxapi.PingRequest{SandboxID: "pod"}); !errdefs.IsUnavailable(err) {
		t.Errorf("ping: %v", err)
	}
	if _, err := e.svc.ShutdownSandbox(t.Context(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod"}); err != nil {
		t.Error(err)
	}
}

func TestSandboxAPIRefused(t *testing.T) {
	e := newEnv(t, nil)
	want := func(what string, is func(error) bool, err error) {
		t.Helper()
		if !is(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := e.svc.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	want("start before create", errdefs.IsNotFound, err)
	_, err = e.svc.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "other", NetnsPath: "/n"})
	want("another one", errdefs.IsInvalidArgument, err)
	_, err = e.svc.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "pod", NetnsPath: e.netns()})
	want("no bundle", errdefs.IsInvalidArgument, err)
	bundle := t.TempDir()
	_, err = e.svc.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "pod", BundlePath: bundle})
	want("the host's network", errdefs.IsInvalidArgument, err)
	_, err = e.svc.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "pod", BundlePath: bundle, NetnsPath: e.netns()})
	want("create", func(err error) bool { return err == nil }, err)
	_, err = e.svc.CreateSandbox(t.Context(), &sandboxapi.CreateSandboxRequest{SandboxID: "pod", BundlePath: bundle, NetnsPath: "/n"})
	want("create twice", errdefs.IsAlreadyExists, err)
	_, err = e.svc.WaitSandbox(t.Context(), &sandboxapi.WaitSandboxRequest{SandboxID: "pod"})
	want("wait before start", errdefs.IsFailedPrecondition, err)
	_, err = e.svc.UpdateSandbox(t.Context(), &sandboxapi.UpdateSandboxRequest{SandboxID: "pod"})
	want("update before start", errdefs.IsFailedPrecondition, err)
	e.startVM = func(context.Context) error { return errdefs.ErrUnavailable }
	_, err = e.svc.StartSandbox(t.Context(), &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	want("start without a machine", errdefs.IsUnavailable, err)
	if st := e.sandboxState(); st.GetState() != stateNotReady {
		t.Errorf("status %v", st)
	}
}
