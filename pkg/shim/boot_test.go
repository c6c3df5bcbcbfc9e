package shim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmshim/vmshim/internal/need"
)

// A bundle is a task as containerd prepares it, and the shim's binary.
type bundle struct {
	tb        testing.TB
	dir       string
	id        string
	socketDir string
	stateDir  string
}

func newBundle(tb testing.TB, id string, spec *specs.Spec) *bundle {
	tb.Helper()
	root := tb.TempDir()
	b := &bundle{
		tb: tb, id: id,
		dir:      filepath.Join(root, id),
		stateDir: filepath.Join(root, "state"),
	}
	socketDir, err := os.MkdirTemp("", "s") //nolint:usetesting // a short path, for a socket
	if err != nil {
		tb.Fatal(err)
	}
	b.socketDir = socketDir
	tb.Cleanup(func() { _ = os.RemoveAll(socketDir) })
	b.make(spec)
	cfg := filepath.Join(root, "config.toml")
	if err := os.WriteFile(cfg, []byte("state_dir = '"+b.stateDir+"'\n"), 0o600); err != nil {
		tb.Fatal(err)
	}
	tb.Setenv("VMSHIM_CONFIG", cfg)
	tb.Setenv("GORACE", "atexit_sleep_ms=0") // of a second, in each process
	tb.Cleanup(func() {
		for _, pid := range daemons(b.dir) {
			tb.Errorf("daemon %d is left", pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	})
	return b
}

// member is a second container for the same pod.
func (b *bundle) member(id string, spec *specs.Spec) *bundle {
	m := *b
	m.id = id
	m.dir = filepath.Join(filepath.Dir(b.dir), id)
	m.make(spec)
	return &m
}

func (b *bundle) make(spec *specs.Spec) {
	b.tb.Helper()
	if err := os.MkdirAll(filepath.Join(b.dir, "rootfs"), 0o700); err != nil {
		b.tb.Fatal(err)
	}
	if spec == nil {
		return
	}
	text, err := json.Marshal(spec)
	if err != nil {
		b.tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "config.json"), text, 0o600); err != nil {
		b.tb.Fatal(err)
	}
}

// call runs the binary as containerd does, stdout and stderr joined or apart.
func (b *bundle) call(stdin []byte, joined bool, args ...string) (stdout, stderr []byte, err error) {
	b.tb.Helper()
	self, err := os.Executable()
	if err != nil {
		b.tb.Fatal(err)
	}
	common := []string{"-namespace", "ns", "-address", "/run/x.sock", "-publish-binary", "/bin/containerd", "-id", b.id}
	cmd := exec.CommandContext(b.tb.Context(), self, append(common, args...)...)
	cmd.Dir = b.dir
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if joined {
		cmd.Stderr = &out
	}
	err = cmd.Run()
	return out.Bytes(), errs.Bytes(), err
}

func (b *bundle) params() *bootapi.BootstrapParams {
	return &bootapi.BootstrapParams{InstanceID: b.id, Namespace: "ns", SocketDir: &b.socketDir}
}

func (b *bundle) start() (*bootapi.BootstrapResult, error) {
	b.tb.Helper()
	stdin, err := proto.Marshal(b.params())
	if err != nil {
		b.tb.Fatal(err)
	}
	out, _, err := b.call(stdin, true, "start")
	if err != nil {
		return nil, errors.New(string(out))
	}
	var answer bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &answer); err != nil {
		b.tb.Fatalf("answer %q: %v", out, err)
	}
	return &answer, nil
}

func (b *bundle) mustStart() string {
	b.tb.Helper()
	answer, err := b.start()
	if err != nil {
		b.tb.Fatal(err)
	}
	return answer.GetAddress()
}

func (b *bundle) delete() *taskapi.DeleteResponse {
	b.tb.Helper()
	begin := time.Now()
	out, errs, err := b.call(nil, false, "-bundle", b.dir, "delete")
	if err != nil || len(errs) > 0 {
		b.tb.Fatalf("delete: %v, stderr %q", err, errs)
	}
	if took := time.Since(begin); took > 5*time.Second {
		b.tb.Errorf("delete took %v", took)
	}
	var answer taskapi.DeleteResponse
	if err := proto.Unmarshal(out, &answer); err != nil {
		b.tb.Fatalf("answer %q: %v", out, err)
	}
	if answer.GetExitStatus() != 137 || time.Since(answer.GetExitedAt().AsTime()) > time.Minute {
		b.tb.Errorf("answer %v", &answer)
	}
	return &answer
}

func (b *bundle) tasks(address string, f func(ctx context.Context, tasks taskapi.TTRPCTaskService)) {
	b.tb.Helper()
	ctx, cancel := context.WithTimeout(b.tb.Context(), 20*time.Second)
	defer cancel()
	err := withDaemon(ctx, address, func(tasks taskapi.TTRPCTaskService) error {
		f(ctx, tasks)
		return nil
	})
	if err != nil {
		b.tb.Fatal(err)
	}
}

// daemons are the pids of processes that work in dir.
func daemons(dir string) (pids []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && target == dir {
			var pid int
			for _, c := range filepath.Base(filepath.Dir(link)) {
				pid = 10*pid + int(c-'0')
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

func (b *bundle) wantNothingLeft(address string) {
	b.tb.Helper()
	if pids := daemons(b.dir); len(pids) > 0 {
		b.tb.Errorf("daemons left: %v", pids)
	}
	if _, err := os.Lstat(socketPath(address)); !errors.Is(err, os.ErrNotExist) {
		b.tb.Errorf("socket left: %v", err)
	}
	if left, _ := os.ReadDir(b.stateDir); len(left) > 0 {
		b.tb.Errorf("state left: %v", left)
	}
}

func pod(kind, sandbox string) *specs.Spec {
	return &specs.Spec{Annotations: map[string]string{
		"io.kubernetes.cri.container-type": kind,
		"io.kubernetes.cri.sandbox-id":     sandbox,
	}}
}

// A daemon before 2.3 reads the bare address and finds it in the bundle again;
// whatever options it sends, they are not taken for BootstrapParams.
func TestStartOldDaemon(t *testing.T) {
	options, err := anypb.New(&runtimeoptions.Options{ConfigPath: "/etc/x.toml"})
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := proto.Marshal(options)
	if err != nil {
		t.Fatal(err)
	}
	strange, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "another", Namespace: "ns"})
	if err != nil {
		t.Fatal(err)
	}
	for name, stdin := range map[string][]byte{"options": stdin, "empty": nil, "garbage": []byte("\xff\xff"), "strange": strange} {
		t.Run(name, func(t *testing.T) {
			b := newBundle(t, "c1-"+name, &specs.Spec{})
			out, _, err := b.call(stdin, true, "start")
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			address := string(out)
			if want := socketAddress("/run/containerd/s", "/run/x.sock", "ns", b.id); address != want {
				t.Errorf("answer %q, want %q", address, want)
			}
			if got := readAddress(b.dir); got != address {
				t.Errorf("address in the bundle %q, want %q", got, address)
			}
			b.tasks(address, func(ctx context.Context, tasks taskapi.TTRPCTaskService) {
				r, err := tasks.Connect(ctx, &taskapi.ConnectRequest{ID: b.id})
				if pids := daemons(b.dir); err != nil || len(pids) != 1 || int(r.GetShimPid()) != pids[0] || r.GetTaskPid() != 0 {
					t.Errorf("Connect: %v, %v; daemons %v", r, err, pids)
				}
				if _, err := tasks.Shutdown(ctx, &taskapi.ShutdownRequest{ID: b.id}); err != nil {
					t.Errorf("Shutdown: %v", err)
				}
			})
			b.delete()
			b.wantNothingLeft(address)
		})
	}
}

func TestStartNewDaemon(t *testing.T) {
	b := newBundle(t, "c1", &specs.Spec{})
	answer, err := b.start()
	if err != nil {
		t.Fatal(err)
	}
	want := &bootapi.BootstrapResult{
		Version:  3,
		Protocol: "ttrpc",
		Address:  socketAddress(b.socketDir, "/run/x.sock", "ns", "c1"),
	}
	if !proto.Equal(answer, want) {
		t.Errorf("answer %v, want %v", answer, want)
	}
	// Twice is an error, and does not hurt the first.
	if _, err := b.start(); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("second start: %v", err)
	}
	b.tasks(answer.GetAddress(), func(ctx context.Context, tasks taskapi.TTRPCTaskService) {
		// The first Create cannot start a machine, and says why.
		_, err := tasks.Create(ctx, &taskapi.CreateTaskRequest{ID: "c1", Bundle: b.dir})
		if err = errgrpc.ToNative(err); err == nil {
			t.Error("Create without a machine succeeds")
		}
		for i, call := range []func() error{
			func() error { _, err := tasks.State(ctx, &taskapi.StateRequest{ID: "c1"}); return err },
			func() error { _, err := tasks.Pids(ctx, &taskapi.PidsRequest{ID: "c1"}); return err },
			func() error { _, err := tasks.Delete(ctx, &taskapi.DeleteRequest{ID: "c1"}); return err },
			func() error { _, err := tasks.Kill(ctx, &taskapi.KillRequest{ID: "c1"}); return err },
		} {
			if err := errgrpc.ToNative(call()); !errdefs.IsNotFound(err) {
				t.Errorf("call %d for a task that is not there: %v", i, err)
			}
		}
		_, err = tasks.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: "c1"})
		if err = errgrpc.ToNative(err); !errdefs.IsNotImplemented(err) {
			t.Errorf("Checkpoint: %v", err)
		}
	})
	b.delete() // without a Shutdown before
	b.wantNothingLeft(answer.GetAddress())
}

func TestStartDaemonFails(t *testing.T) {
	b := newBundle(t, "c1", &specs.Spec{})
	if err := os.Mkdir(filepath.Join(b.dir, recordFile+".new"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := b.start()
	if err == nil || !strings.Contains(err.Error(), "start daemon: write record") {
		t.Errorf("got %v", err)
	}
	b.wantNothingLeft(socketAddress(b.socketDir, "/run/x.sock", "ns", "c1"))
}

// The stale socket of a daemon that was killed is no obstacle.
func TestStartAfterKill(t *testing.T) {
	b := newBundle(t, "c1", &specs.Spec{})
	b.mustStart()
	for _, pid := range daemons(b.dir) {
		kill(t, pid)
	}
	address := b.mustStart()
	b.delete()
	b.wantNothingLeft(address)
}

func kill(tb testing.TB, pid int) {
	tb.Helper()
	start, err := processStart(pid)
	if err != nil {
		tb.Fatal(err)
	}
	p, err := openPidfd(pid, start)
	if err != nil {
		tb.Fatal(err)
	}
	defer p.close()
	p.kill()
	if !p.wait(10 * time.Second) {
		tb.Fatalf("process %d survives SIGKILL", pid)
	}
}

// The daemon has a session of its own and nothing of its parent's.
func TestDaemonProcess(t *testing.T) {
	b := newBundle(t, "c1", &specs.Spec{})
	if err := unix.Mkfifo(filepath.Join(b.dir, logFile), 0o600); err != nil {
		t.Fatal(err)
	}
	b.mustStart()
	pid := daemons(b.dir)[0]
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("session %d, %v", sid, err)
	}
	for fd, want := range map[string]string{"0": "/dev/null", "1": "/dev/null", "2": filepath.Join(b.dir, logFile)} {
		if got, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "fd", fd)); err != nil || got != want {
			t.Errorf("fd %s is %q, %v; want %q", fd, got, err, want)
		}
	}
	b.delete()
}

// Where the host hands its mounts on, the daemon has a mount namespace of its
// own, which sees the host's mounts and keeps its own to itself.
func TestDaemonMounts(t *testing.T) {
	need.Root(t)
	b := newBundle(t, "c1", &specs.Spec{})
	stdin, err := proto.Marshal(b.params())
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A namespace without a process ends, and its mounts are no masters any
	// more: the shell stays in it until its input ends.
	cmd := exec.CommandContext(t.Context(), "unshare", "-m", "--propagation", "shared", "sh", "-c",
		`readlink /proc/self/ns/mnt >ns; "$0" "$@" <params >answer && echo started && cd / && exec cat`,
		self, "-namespace", "ns", "-address", "/run/x.sock", "-id", "c1", "start")
	cmd.Dir = b.dir
	if err := os.WriteFile(filepath.Join(b.dir, "params"), stdin, 0o600); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stay, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	leave := func() {
		stay.Close()
		_, _ = io.Copy(io.Discard, stdout)
		_ = cmd.Wait()
	}
	defer leave()
	if answer, err := bufio.NewReader(stdout).ReadString('\n'); answer != "started\n" {
		leave()
		t.Fatalf("start: %q, %v: %s", answer, err, &stderr)
	}
	pid := daemons(b.dir)[0]
	host, err := os.ReadFile(filepath.Join(b.dir, "ns"))
	if err != nil {
		t.Fatal(err)
	}
	if ns, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns/mnt")); err != nil || ns == strings.TrimSpace(string(host)) {
		t.Errorf("mount namespace %s, %v; that of start is %s", ns, err, host)
	}
	mounts, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "mountinfo"))
	if err != nil || !strings.Contains(string(mounts), " master:") || strings.Contains(string(mounts), " shared:") {
		t.Errorf("mounts of the daemon, %v:\n%s", err, mounts)
	}
	b.delete()
	if hostSharesMounts() {
		return
	}
	// Otherwise it stays with the host.
	b.mustStart()
	pid = daemons(b.dir)[0]
	want, _ := os.Readlink("/proc/self/ns/mnt")
	if ns, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns/mnt")); err != nil || ns != want {
		t.Errorf("mount namespace %s, %v; want the host's %s", ns, err, want)
	}
	b.delete()
}

func TestDelete(t *testing.T) {
	t.Run("killed", func(t *testing.T) {
		b := newBundle(t, "c1", &specs.Spec{})
		address := b.mustStart()
		kill(t, daemons(b.dir)[0])
		b.delete()
		b.wantNothingLeft(address)
		b.delete() // again
	})
	t.Run("hanging", func(t *testing.T) {
		b := newBundle(t, "c1", &specs.Spec{})
		address := b.mustStart()
		_ = unix.Kill(daemons(b.dir)[0], unix.SIGSTOP)
		b.delete()
		b.wantNothingLeft(address)
	})
	t.Run("never started", func(t *testing.T) {
		b := newBundle(t, "c1", &specs.Spec{})
		b.delete()
	})
	t.Run("empty bundle", func(t *testing.T) {
		b := newBundle(t, "c1", nil)
		b.delete()
	})
	t.Run("damaged", func(t *testing.T) {
		b := newBundle(t, "c1", &specs.Spec{})
		address := b.mustStart()
		kill(t, daemons(b.dir)[0])
		for _, name := range []string{recordFile, specFile} {
			if err := os.WriteFile(filepath.Join(b.dir, name), []byte("{\"pid\":"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		b.delete()
		b.wantNothingLeft(address)
	})
}

func TestPod(t *testing.T) {
	b := newBundle(t, "pod", pod("sandbox", "pod"))
	m := b.member("member", pod("container", "pod"))
	if _, err := m.start(); err == nil || !strings.Contains(err.Error(), `shim of sandbox "pod"`) {
		t.Errorf("start of a member without its pod: %v", err)
	}
	address := b.mustStart()
	if got := m.mustStart(); got != address {
		t.Errorf("address of the member %q, want the pod's %q", got, address)
	}
	if got := readAddress(m.dir); got != address {
		t.Errorf("address in the member's bundle %q", got)
	}
	m.delete()
	if len(daemons(b.dir)) != 1 {
		t.Error("delete of a member ended the pod")
	}
	b.tasks(address, func(ctx context.Context, tasks taskapi.TTRPCTaskService) {
		_, err := tasks.Create(ctx, &taskapi.CreateTaskRequest{ID: "member", Bundle: m.dir})
		if err = errgrpc.ToNative(err); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("Create of a member before its sandbox: %v", err)
		}
	})
	// As if it had been created.
	r, err := readRecord(b.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.write(m.dir); err != nil {
		t.Fatal(err)
	}
	m.delete()
	if len(daemons(b.dir)) != 1 {
		t.Error("delete of a member ended the pod")
	}
	// The pod's daemon dies: any delete cleans up.
	kill(t, daemons(b.dir)[0])
	m.delete()
	b.wantNothingLeft(address)
	b.delete()
}

func TestInfo(t *testing.T) {
	b := newBundle(t, "c1", nil)
	options, err := anypb.New(&runtimeoptions.Options{ConfigPath: "/x"})
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := proto.Marshal(options)
	if err != nil {
		t.Fatal(err)
	}
	out, errs, err := b.call(stdin, false, "-info")
	if err != nil || len(errs) > 0 {
		t.Fatalf("%v: %s", err, errs)
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out, &info); err != nil {
		t.Fatal(err)
	}
	if info.GetName() != Name || info.GetVersion().GetVersion() != "test" || !proto.Equal(info.GetOptions(), options) {
		t.Errorf("info %v", &info)
	}
	if want := "types.containerd.io/opencontainers/runtime-spec/1/features/Features"; info.GetFeatures().GetTypeUrl() != want {
		t.Errorf("features are %q, want %q", info.GetFeatures().GetTypeUrl(), want)
	}
	var f features.Features
	if err := json.Unmarshal(info.GetFeatures().GetValue(), &f); err != nil {
		t.Fatal(err)
	}
	if f.Linux == nil || *f.Linux.MountExtensions.IDMap.Enabled || slices.Contains(f.MountOptions, "rshared") {
		t.Errorf("features %+v", f)
	}
}

func TestMainRefuses(t *testing.T) {
	for name, args := range map[string][]string{
		"nothing":        nil,
		"no namespace":   {"-id", "x", "start"},
		"no id":          {"-namespace", "x", "start"},
		"unknown flag":   {"-what"},
		"unknown action": {"-namespace", "x", "-id", "y", "dance"},
	} {
		t.Run(name, func(t *testing.T) {
			var out, errs bytes.Buffer
			if code := Main(t.Context(), args, strings.NewReader(""), &out, &errs, noMachines()); code != 1 || errs.Len() == 0 || out.Len() > 0 {
				t.Errorf("exit code %d, stdout %q, stderr %q", code, &out, &errs)
			}
		})
	}
	var out, errs bytes.Buffer
	if code := Main(t.Context(), []string{"-v"}, strings.NewReader(""), &out, &errs, noMachines()); code != 0 || !strings.Contains(out.String(), "test") {
		t.Errorf("version: exit code %d, stdout %q", code, &out)
	}
}

func FuzzBootstrap(f *testing.F) {
	good, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "id", Namespace: "ns"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte("unix:///run/x"))
	c := command{id: "id", namespace: "ns"}
	f.Fuzz(func(t *testing.T, stdin []byte) {
		params, _, err := c.bootstrap(bytes.NewReader(stdin))
		if err != nil || params != nil && params.GetInstanceID() != "id" {
			t.Errorf("%v, %v", params, err)
		}
	})
}
