package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/test/ociimage"
)

// A tasks is one task as containerd sees it: a bundle, and a connection to its shim.
type tasks struct {
	*host
	taskapi.TTRPCTaskService
	id      string
	bundle  string
	address string
	spec    *specs.Spec
	conn    *ttrpc.Client
	io      *fifos
	log     *os.File // the shim's
	pid     uint32
	version int // of the task API that start answered
}

// bundle prepares a task that runs a command.
func (h *host) bundle(id string, args ...string) *tasks {
	h.Helper()
	t := &tasks{host: h, id: id, bundle: filepath.Join(h.dir, "b", id)}
	rootfs := filepath.Join(t.bundle, "rootfs")
	if err := os.MkdirAll(rootfs, 0o711); err != nil {
		h.Fatal(err)
	}
	h.unpack(rootfs)
	t.spec = newSpec(args...)
	// containerd reads the shim's log from a fifo; a file shows more.
	f, err := os.Create(filepath.Join(t.bundle, "log"))
	if err != nil {
		h.Fatal(err)
	}
	t.log = f
	h.all = append(h.all, t)
	h.Cleanup(func() {
		_ = t.log.Close()
		if h.Failed() {
			h.Logf("log of the shim of %s:\n%s", id, t.logText())
		}
	})
	return t
}

// logs waits for the shim to log the text: it does that beside its events.
func (t *tasks) logs(text string) {
	t.Helper()
	for deadline := time.Now().Add(vmtest.Within(2 * time.Second)); !strings.Contains(t.logText(), text); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the log does not say %q", text)
		}
	}
}

func (t *tasks) logText() string {
	text, _ := os.ReadFile(filepath.Join(t.bundle, "log"))
	return string(text)
}

// unpack makes the root file system of the test image.
func (h *host) unpack(rootfs string) {
	h.Helper()
	for _, d := range []string{"bin", "dev", "etc", "proc", "sys", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			h.Fatal(err)
		}
	}
	busybox, err := os.ReadFile(ociimage.Busybox)
	if err != nil {
		h.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/busybox"), busybox, 0o755); err != nil {
		h.Fatal(err)
	}
	list, err := exec.CommandContext(h.Context(), ociimage.Busybox, "--list").Output()
	if err != nil {
		h.Fatal(err)
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet == "busybox" {
			continue
		}
		if err := os.Link(filepath.Join(rootfs, "bin/busybox"), filepath.Join(rootfs, "bin", applet)); err != nil {
			h.Fatal(err)
		}
	}
}

// cgroupsPath is where the control groups of all sandboxes of this process are.
func cgroupsPath() string { return "/vmshim-test-" + strconv.Itoa(os.Getpid()) }

// newSpec is much as ctr makes it.
func newSpec(args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SYS_CHROOT", "CAP_NET_BIND_SERVICE"}
	return &specs.Spec{
		Version: "1.1.0",
		Process: &specs.Process{
			Args: args, Env: []string{"PATH=/bin"}, Cwd: "/",
			Capabilities:    &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
			NoNewPrivileges: true,
		},
		Root: &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: cgroupsPath(),
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace},
				{Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace},
			},
			Resources: &specs.LinuxResources{},
		},
	}
}

// start runs the shim and connects to it.
func (t *tasks) start() *tasks {
	t.Helper()
	text, err := json.Marshal(t.spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(t.bundle, "config.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	params, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: t.id, Namespace: t.ns, SocketDir: &t.sockets, ContainerdTtrpcAddress: t.sink.path,
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := t.command(params, "start").CombinedOutput()
	if err != nil {
		t.Fatalf("start: %v: %s", err, out)
	}
	var answer bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &answer); err != nil {
		t.Fatalf("answer %q: %v", out, err)
	}
	t.address, t.version = answer.GetAddress(), int(answer.GetVersion())
	t.connect()
	return t
}

func (t *tasks) connect() {
	t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(t.address, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	t.conn = ttrpc.NewClient(conn)
	t.TTRPCTaskService = taskapi.NewTTRPCTaskClient(t.conn)
	t.Cleanup(func() { _ = t.conn.Close() })
}

func (t *tasks) command(stdin []byte, args ...string) *exec.Cmd {
	common := []string{"-namespace", t.ns, "-address", filepath.Join(t.dir, "c.sock"), "-publish-binary", "/bin/false", "-id", t.id}
	cmd := exec.Command(t.binary, append(common, args...)...)
	cmd.Dir = t.bundle
	cmd.Env = append(os.Environ(), "VMSHIM_CONFIG="+t.local.ShimConfig(), "TTRPC_ADDRESS="+t.sink.path,
		"PATH="+t.local.ShimDir()+":"+os.Getenv("PATH"))
	cmd.Stdin = bytes.NewReader(stdin)
	return cmd
}

func (t *tasks) ctx() context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// create creates the task with fifos for its streams.
func (t *tasks) create() *tasks {
	t.Helper()
	if t.io == nil {
		t.io = t.fifos(t.id, t.spec.Process.Terminal)
	}
	r, err := t.Create(t.ctx(), t.createRequest())
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	t.pid = r.GetPid()
	t.sink.want(t, "create "+t.id)
	return t
}

func (t *tasks) createRequest() *taskapi.CreateTaskRequest {
	r := &taskapi.CreateTaskRequest{ID: t.id, Bundle: t.bundle, Terminal: t.spec.Process.Terminal}
	if t.io != nil {
		r.Stdin, r.Stdout, r.Stderr = t.io.stdin, t.io.stdout, t.io.stderr
	}
	return r
}

// run starts everything up to the running process.
func (t *tasks) run() *tasks {
	t.Helper()
	t.start().create().startTask()
	return t
}

func (t *tasks) startTask() {
	t.Helper()
	if _, err := t.Start(t.ctx(), &taskapi.StartRequest{ID: t.id}); err != nil {
		t.Fatalf("Start: %v", err)
	}
	t.sink.want(t, "start "+t.id)
}

// exec registers a process and starts it.
func (t *tasks) exec(id string, f *fifos, change func(*specs.Process), args ...string) {
	t.Helper()
	if err := t.addExec(id, f, change, args...); err != nil {
		t.Fatalf("Exec: %v", err)
	}
	t.sink.want(t, "exec-added "+t.id+" "+id)
	if _, err := t.Start(t.ctx(), &taskapi.StartRequest{ID: t.id, ExecID: id}); err != nil {
		t.Fatalf("Start %s: %v", id, err)
	}
	t.sink.want(t, "exec-started "+t.id+" "+id)
}

func (t *tasks) addExec(id string, f *fifos, change func(*specs.Process), args ...string) error {
	t.Helper()
	p := *newSpec(args...).Process
	if change != nil {
		change(&p)
	}
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	r := &taskapi.ExecProcessRequest{
		ID: t.id, ExecID: id, Terminal: p.Terminal,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: text},
	}
	if f != nil {
		r.Stdin, r.Stdout, r.Stderr = f.stdin, f.stdout, f.stderr
	}
	_, err = t.Exec(t.ctx(), r)
	return err
}

// wait waits for the end of a process and returns its code.
func (t *tasks) wait(execID string) uint32 {
	t.Helper()
	r, err := t.Wait(t.ctx(), &taskapi.WaitRequest{ID: t.id, ExecID: execID})
	if err != nil {
		t.Fatalf("Wait: %v", err)
	}
	return r.GetExitStatus()
}

func (t *tasks) kill(signal unix.Signal) {
	t.Helper()
	if _, err := t.Kill(t.ctx(), &taskapi.KillRequest{ID: t.id, Signal: uint32(signal)}); err != nil {
		t.Fatalf("Kill: %v", err)
	}
}

func (t *tasks) wantStatus(want task.Status) {
	t.Helper()
	begin := time.Now()
	r, err := t.State(t.ctx(), &taskapi.StateRequest{ID: t.id})
	if err != nil || r.GetStatus() != want {
		t.Errorf("State %v, %v; want %v", r.GetStatus(), err, want)
	}
	if took := time.Since(begin); took > vmtest.Within(time.Second) {
		t.Errorf("State took %v", took)
	}
}

// end kills the task if it runs, deletes it, and has the daemon shut down, as
// containerd does it.
func (t *tasks) end() {
	t.Helper()
	_, err := t.Kill(t.ctx(), &taskapi.KillRequest{ID: t.id, Signal: uint32(unix.SIGKILL), All: true})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		t.Errorf("Kill: %v", err)
	}
	code := t.wait("")
	t.sink.want(t, fmt.Sprintf("exit %s %s %d", t.id, t.id, code))
	t.delete()
}

// delete deletes a task that has ended, and has the daemon shut down.
func (t *tasks) delete() {
	t.Helper()
	if _, err := t.Delete(t.ctx(), &taskapi.DeleteRequest{ID: t.id}); err != nil {
		t.Errorf("Delete: %v", err)
	}
	t.sink.want(t, "delete "+t.id)
	t.shutdown()
}

func (t *tasks) shutdown() {
	t.Helper()
	if _, err := t.Shutdown(t.ctx(), &taskapi.ShutdownRequest{ID: t.id}); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	_ = t.conn.Close()
	t.cleanup()
}

// cleanup is the delete command.
func (t *tasks) cleanup() *taskapi.DeleteResponse {
	t.Helper()
	begin := time.Now()
	cmd := t.command(nil, "-bundle", t.bundle, "delete")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil || errs.Len() > 0 {
		t.Errorf("delete: %v: %s", err, &errs)
	}
	if took := time.Since(begin); took > vmtest.Within(5*time.Second) {
		t.Errorf("delete took %v", took)
	}
	var answer taskapi.DeleteResponse
	if err := proto.Unmarshal(out, &answer); err != nil {
		t.Errorf("answer %q: %v", out, err)
	}
	return &answer
}

// A class is a check for an error's class.
type class func(error) bool

func (t *tasks) wantClass(what string, want class, err error) {
	t.Helper()
	if err = errgrpc.ToNative(err); !want(err) {
		t.Errorf("%s: %v", what, err)
	}
}
