package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/config"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/sandbox"
)

// A machine is a guest without a machine.
type machine struct {
	peer  *agenttest.Peer
	ready chan struct{}
	done  chan struct{}
	once  sync.Once
	sizes chan string // that it was given
}

func (m *machine) ResizeCPUs(_ context.Context, n int) (int, error) {
	m.sizes <- fmt.Sprintf("%d CPUs", n)
	return n, nil
}

func (m *machine) ResizeMemory(_ context.Context, mib int) (hypervisor.Memory, error) {
	m.sizes <- fmt.Sprintf("%d MiB", mib)
	return hypervisor.Memory{MiB: mib}, nil
}

func (m *machine) Ready() <-chan struct{}          { return m.ready }
func (m *machine) AgentURL(port uint32) string     { return fmt.Sprintf("hvsock:///fake:%d", port) }
func (m *machine) Done() <-chan struct{}           { return m.done }
func (m *machine) Err() error                      { return errors.New("qemu: killed") }
func (m *machine) Console() string                 { return "" }
func (m *machine) Processes() []hypervisor.Process { return nil }
func (m *machine) Examine()                        {}
func (m *machine) Restored() bool                  { return false }
func (m *machine) Shutdown(context.Context) error  { return m.Kill() }

func (m *machine) PlugNIC(context.Context, hypervisor.NIC, []*os.File, []*os.File) (string, error) {
	return "01", nil
}

func (m *machine) UnplugNIC(context.Context, string) error { return nil }

func (m *machine) Kill() error {
	m.once.Do(func() { close(m.done) })
	return nil
}

func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-m.done:
		return nil, errors.New("machine is off")
	default:
		return m.peer.Dial(ctx, port)
	}
}

// An env is a service that serves on a socket, as the daemon's does.
type env struct {
	testing.TB
	taskapi.TTRPCTaskService
	dir    string
	cmd    command
	peer   *agenttest.Peer
	sink   *eventSink
	svc    *service
	events *publisher

	startVM func(context.Context) error // fails or delays the start of the machine

	mu      sync.Mutex
	machine *machine // guarded by mu: the last one
}

// newEnv serves the sandbox "pod" whose processes run a function.
func newEnv(tb testing.TB, program func(ctx context.Context, p *agenttest.Process) int) *env {
	tb.Helper()
	need.Root(tb)
	tb.Setenv("GORACE", "atexit_sleep_ms=0")
	dir, err := os.MkdirTemp("", "s") //nolint:usetesting // a short path, for sockets
	if err != nil {
		tb.Fatal(err)
	}
	cfg := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(cfg, []byte("state_dir = '"+dir+"/vm'\n"), 0o600); err != nil {
		tb.Fatal(err)
	}
	tb.Setenv("VMSHIM_CONFIG", cfg)
	e := &env{
		TB: tb, dir: dir,
		cmd:  command{namespace: "ns", id: "pod", address: "/run/x.sock"},
		peer: agenttest.Start(tb, agenttest.Options{Program: program}),
		sink: newEventSink(tb),
	}
	e.events = newPublisher(tb.Context(), e.sink.path, "ns")
	opts := Options{Version: "test", Sandbox: func(cfg config.Config) sandbox.Options {
		return sandbox.Options{Config: cfg.Sandbox, StartVM: e.start}
	}}
	self := record{Sandbox: "pod", Address: unixScheme + filepath.Join(dir, "sock"), PID: os.Getpid()}
	e.svc = newService(tb.Context(), e.cmd, opts, self, e.events)
	e.serve()
	tb.Cleanup(func() {
		e.close()
		for _, name := range []string{"mountinfo", "vm"} {
			if left := e.left(name); left != "" {
				tb.Errorf("left: %s", left)
			}
		}
		_ = os.RemoveAll(dir)
	})
	return e
}

func (e *env) left(what string) string {
	if what == "vm" {
		entries, _ := os.ReadDir(filepath.Join(e.dir, "vm"))
		if len(entries) > 0 {
			return fmt.Sprint(entries)
		}
		return ""
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, e.dir+"/") {
			return line
		}
	}
	return ""
}

func (e *env) start(ctx context.Context, _ hypervisor.Spec, _ sandbox.VMOptions) (sandbox.Machine, error) {
	if e.startVM != nil {
		if err := e.startVM(ctx); err != nil {
			return nil, err
		}
	}
	m := &machine{peer: e.peer, ready: make(chan struct{}), done: make(chan struct{}), sizes: make(chan string, 10)}
	close(m.ready)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.machine = m
	return m, nil
}

func (e *env) killMachine() {
	e.mu.Lock()
	defer e.mu.Unlock()
	_ = e.machine.Kill()
}

func (e *env) serve() {
	e.Helper()
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(edge))
	if err != nil {
		e.Fatal(err)
	}
	e.svc.register(server)
	path := filepath.Join(e.dir, "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		e.Fatal(err)
	}
	go func() { _ = server.Serve(context.WithoutCancel(e.Context()), l) }()
	conn, err := net.Dial("unix", path)
	if err != nil {
		e.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	e.TTRPCTaskService = taskapi.NewTTRPCTaskClient(client)
	e.Cleanup(func() {
		_ = client.Close()
		_ = server.Close()
	})
}

// close ends the service as the daemon does.
func (e *env) close() {
	e.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.Context()), 20*time.Second)
	defer cancel()
	soon(e, "close service", func() {
		e.svc.close(ctx)
		select {
		case <-e.events.closing:
		default:
			e.events.close(ctx)
		}
	})
}

func (e *env) bundle(id string, change ...func(*specs.Spec)) string {
	e.Helper()
	dir := filepath.Join(e.dir, "b-"+id)
	if err := os.MkdirAll(filepath.Join(dir, "rootfs"), 0o755); err != nil {
		e.Fatal(err)
	}
	spec := &specs.Spec{
		Version: "1.2.0",
		Process: &specs.Process{Args: []string{"true"}, Cwd: "/"},
		Root:    &specs.Root{Path: "rootfs"},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.MountNamespace},
			{Type: specs.NetworkNamespace},
			{Type: specs.PIDNamespace},
			{Type: specs.IPCNamespace},
			{Type: specs.UTSNamespace},
		}},
	}
	for _, f := range change {
		f(spec)
	}
	text, err := json.Marshal(spec)
	if err != nil {
		e.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, specFile), text, 0o600); err != nil {
		e.Fatal(err)
	}
	return dir
}

func (e *env) create(id string, change ...func(*specs.Spec)) error {
	e.Helper()
	_, err := e.Create(e.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: e.bundle(id, change...)})
	return errgrpc.ToNative(err)
}

func (e *env) mustCreate(ids ...string) {
	e.Helper()
	for _, id := range ids {
		if err := e.create(id); err != nil {
			e.Fatal(err)
		}
	}
}

func (e *env) mustStart(id, execID string) {
	e.Helper()
	if _, err := e.Start(e.Context(), &taskapi.StartRequest{ID: id, ExecID: execID}); err != nil {
		e.Fatal(err)
	}
}

func (e *env) mustExec(id, execID string) {
	e.Helper()
	if err := e.exec(id, execID); err != nil {
		e.Fatal(err)
	}
}

func (e *env) exec(id, execID string) error {
	_, err := e.Exec(e.Context(), &taskapi.ExecProcessRequest{ID: id, ExecID: execID, Spec: &anypb.Any{
		TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: []byte(`{"args":["true"],"cwd":"/"}`),
	}})
	return errgrpc.ToNative(err)
}

func (e *env) mustKill(id, execID string) {
	e.Helper()
	if _, err := e.Kill(e.Context(), &taskapi.KillRequest{ID: id, ExecID: execID, Signal: uint32(unix.SIGKILL)}); err != nil {
		e.Fatal(err)
	}
}

func (e *env) mustDelete(id, execID string, code uint32) {
	e.Helper()
	r, err := e.Delete(e.Context(), &taskapi.DeleteRequest{ID: id, ExecID: execID})
	if err != nil || r.GetExitStatus() != code {
		e.Fatalf("Delete: %v, %v; want exit code %d", r, err, code)
	}
}

func (e *env) wait(id, execID string) uint32 {
	e.Helper()
	r, err := e.Wait(e.Context(), &taskapi.WaitRequest{ID: id, ExecID: execID})
	if err != nil {
		e.Fatal(err)
	}
	return r.GetExitStatus()
}

func TestServicePod(t *testing.T) {
	e := newEnv(t, nil)
	if err := e.create("member"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a member before its pod: %v", err)
	}
	e.mustCreate("pod", "one", "two")
	if err := e.create("one"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a container twice: %v", err)
	}
	for _, id := range []string{"pod", "one", "two"} {
		e.mustStart(id, "")
	}
	if r, err := readRecord(filepath.Join(e.dir, "b-one")); err != nil || r.Sandbox != "pod" || r.Task == 0 || r.Dir == "" {
		t.Errorf("record of a member: %+v, %v", r, err)
	}
	if got := readAddress(filepath.Join(e.dir, "b-one")); got != unixScheme+filepath.Join(e.dir, "sock") {
		t.Errorf("address in the bundle of a member: %q", got)
	}
	e.mustKill("one", "")
	if code := e.wait("one", ""); code != 137 {
		t.Errorf("exit code %d", code)
	}
	e.mustDelete("one", "", 137)
	if _, err := e.Shutdown(e.Context(), &taskapi.ShutdownRequest{ID: "one"}); err != nil {
		t.Error(err)
	}
	select {
	case <-e.svc.done:
		t.Error("shut down with two containers")
	default:
	}
	// The container that stands for the pod takes the machine with it.
	e.mustKill("pod", "")
	e.wait("pod", "")
	e.mustDelete("pod", "", 137)
	if code := e.wait("two", ""); code != 137 {
		t.Errorf("exit code %d", code)
	}
	e.mustDelete("two", "", 137)
	if _, err := e.Shutdown(e.Context(), &taskapi.ShutdownRequest{ID: "two"}); err != nil {
		t.Error(err)
	}
	soon(t, "shutdown", func() { <-e.svc.done })
	if err := e.create("pod"); !errdefs.IsUnavailable(err) {
		t.Errorf("Create after Shutdown: %v", err)
	}
	e.close()
	e.sink.want(t, "/tasks/create pod", "/tasks/create one", "/tasks/create two",
		"/tasks/start pod", "/tasks/start one", "/tasks/start two",
		"/tasks/exit one one 137", "/tasks/delete one", "/tasks/exit pod pod 137", "/tasks/delete pod",
		"/tasks/exit two two 137", "/tasks/delete two")
}

// However fast a process is: its start is heard of before its end, its
// container's end after all others, OOM before that.
func TestServiceOrder(t *testing.T) {
	e := newEnv(t, func(ctx context.Context, p *agenttest.Process) int {
		switch {
		case p.Exec != nil && strings.HasPrefix(p.ExecID, "short"):
			return 3
		case p.Exec == nil && p.ContainerID == "pod":
			p.OOMKilled = true
		}
		<-ctx.Done()
		return 0
	})
	e.mustCreate("pod")
	e.mustStart("pod", "")
	want := []string{"/tasks/create pod", "/tasks/start pod"}
	for i := range 20 {
		id := fmt.Sprint("short", i)
		e.mustExec("pod", id)
		e.mustStart("pod", id)
		if code := e.wait("pod", id); code != 3 {
			t.Errorf("exit code %d", code)
		}
		e.mustDelete("pod", id, 3)
		want = append(want, "/tasks/exec-added pod "+id, "/tasks/exec-started pod "+id, "/tasks/exit pod "+id+" 3")
	}
	e.mustExec("pod", "long")
	e.mustStart("pod", "long")
	e.mustExec("pod", "never")
	e.mustKill("pod", "")
	e.wait("pod", "")
	if err := e.exec("pod", "late"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Exec in a container that has ended: %v", err)
	}
	_, err := e.Start(e.Context(), &taskapi.StartRequest{ID: "pod", ExecID: "never"})
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("Start in a container that has ended: %v", err)
	}
	e.mustDelete("pod", "", 137)
	e.sink.want(t, append(want, "/tasks/exec-added pod long", "/tasks/exec-started pod long", "/tasks/exec-added pod never",
		"/tasks/oom pod", "/tasks/exit pod long 137", "/tasks/exit pod pod 137", "/tasks/delete pod")...)
}

// What the guest's kernel kills before Start has returned is heard of behind it.
func TestServiceEarlyOOM(t *testing.T) {
	var e *env
	e = newEnv(t, func(ctx context.Context, p *agenttest.Process) int {
		e.peer.OOM(p.ContainerID)
		<-ctx.Done()
		return 0
	})
	err := e.create("pod", func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{Poststart: []specs.Hook{{Path: "/bin/sleep", Args: []string{"sleep", "0.5"}}}}
	})
	if err != nil {
		t.Fatal(err)
	}
	e.mustStart("pod", "")
	e.mustKill("pod", "")
	e.wait("pod", "")
	e.mustDelete("pod", "", 137)
	e.sink.want(t, "/tasks/create pod", "/tasks/start pod", "/tasks/oom pod", "/tasks/exit pod pod 137", "/tasks/delete pod")
}

func TestServiceMachineLost(t *testing.T) {
	e := newEnv(t, nil)
	e.mustCreate("pod", "one")
	e.mustStart("pod", "")
	e.mustExec("pod", "e1")
	e.mustStart("pod", "e1")
	e.killMachine()
	for _, p := range [][2]string{{"pod", "e1"}, {"pod", ""}, {"one", ""}} {
		if code := e.wait(p[0], p[1]); code != 137 {
			t.Errorf("%v: exit code %d", p, code)
		}
	}
	if r, err := e.State(e.Context(), &taskapi.StateRequest{ID: "pod"}); err != nil || r.GetStatus() != task.Status_STOPPED || r.GetExitStatus() != 137 {
		t.Errorf("State: %v, %v", r, err)
	}
	e.mustDelete("one", "", 137)
	e.mustDelete("pod", "", 137)
	e.close()
	got := e.sink.all()
	if i, j := slices.Index(got, "/tasks/exit pod e1 137"), slices.Index(got, "/tasks/exit pod pod 137"); i < 0 || j < i {
		t.Errorf("events %q", got)
	}
}

// A daemon that is told to end by a signal says how its tasks ended.
func TestServiceClose(t *testing.T) {
	e := newEnv(t, nil)
	e.mustCreate("pod")
	e.mustStart("pod", "")
	e.mustExec("pod", "e1")
	e.mustStart("pod", "e1")
	e.mustExec("pod", "never")
	e.close()
	e.sink.want(t, "/tasks/create pod", "/tasks/start pod", "/tasks/exec-added pod e1", "/tasks/exec-started pod e1",
		"/tasks/exec-added pod never", "/tasks/exit pod e1 137", "/tasks/exit pod pod 137")
}

// A Create is undone when the machine does not start, when its caller leaves,
// when the daemon ends; another one may follow.
func TestServiceCreateFails(t *testing.T) {
	e := newEnv(t, nil)
	e.startVM = func(context.Context) error { return fmt.Errorf("no qemu: %w", errdefs.ErrUnavailable) }
	if err := e.create("pod"); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no qemu") {
		t.Errorf("Create: %v", err)
	}
	started := make(chan struct{}, 1)
	e.startVM = func(ctx context.Context) error {
		started <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := e.Create(ctx, &taskapi.CreateTaskRequest{ID: "pod", Bundle: e.bundle("pod")})
	if err == nil {
		t.Error("Create succeeds without a machine")
	}
	soon(t, "start of the machine", func() { <-started })
	e.startVM = nil
	// The first one may still be on its way down.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err = e.create("pod"); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		t.Errorf("Create after a failure: %v", err)
	}
	e.mustDelete("pod", "", 137)
	e.startVM = func(ctx context.Context) error {
		started <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	done := make(chan error, 1)
	go func() { done <- e.create("pod") }()
	soon(t, "start of the machine", func() { <-started })
	e.close()
	if err := <-done; err == nil {
		t.Error("Create succeeds in a daemon that ends")
	}
}

func TestServiceOptions(t *testing.T) {
	e := newEnv(t, nil)
	for name, options := range map[string]*anypb.Any{
		"type":    {TypeUrl: "example.com/what"},
		"garbage": {TypeUrl: "runtimeoptions.v1.Options", Value: []byte{0xff}},
	} {
		_, err := e.Create(e.Context(), &taskapi.CreateTaskRequest{ID: "pod", Bundle: e.bundle("pod"), Options: options})
		if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	err := e.create("pod", func(s *specs.Spec) { s.Annotations = map[string]string{"io.vmshim.vcpus": "2"} })
	if !errdefs.IsPermissionDenied(err) {
		t.Errorf("annotation that is not allowed: %v", err)
	}
	_, err = e.Create(e.Context(), &taskapi.CreateTaskRequest{ID: "pod", Bundle: e.bundle("pod"), Checkpoint: "/x"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotImplemented(err) {
		t.Errorf("checkpoint: %v", err)
	}
	_, err = e.Create(e.Context(), &taskapi.CreateTaskRequest{ID: "pod", Bundle: e.dir})
	if err = errgrpc.ToNative(err); err == nil || !strings.Contains(err.Error(), "read spec") {
		t.Errorf("bundle without a spec: %v", err)
	}
	e.mustCreate("pod")
	e.mustStart("pod", "")
	if _, err := e.Exec(e.Context(), &taskapi.ExecProcessRequest{ID: "pod", ExecID: "x", Spec: &anypb.Any{Value: []byte("{")}}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("Exec of garbage: %v", err)
	}
	if _, err := e.Update(e.Context(), &taskapi.UpdateTaskRequest{ID: "pod", Resources: &anypb.Any{Value: []byte("{")}}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("Update by garbage: %v", err)
	}
	e.mustKill("pod", "")
	e.wait("pod", "")
	e.mustDelete("pod", "", 137)
}

// Many calls at the same time end as one after the other.
func TestServiceDeleteAtOnce(t *testing.T) {
	e := newEnv(t, nil)
	e.mustCreate("pod")
	e.mustStart("pod", "")
	e.mustKill("pod", "")
	e.wait("pod", "")
	errs := make(chan error, 8)
	for range cap(errs) {
		go func() {
			_, err := e.Delete(e.Context(), &taskapi.DeleteRequest{ID: "pod"})
			errs <- errgrpc.ToNative(err)
		}()
	}
	good := 0
	for range cap(errs) {
		switch err := <-errs; {
		case err == nil:
			good++
		case !errdefs.IsNotFound(err):
			t.Errorf("Delete: %v", err)
		}
	}
	if good != 1 {
		t.Errorf("%d Deletes succeed, want 1", good)
	}
}
