package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

// A machine is a process that only sleeps, and a guest that is a scripted
// agent on real sockets.
type machine struct {
	env  *env
	cmd  *exec.Cmd
	proc hypervisor.Process

	ready chan struct{}
	done  chan struct{}
}

func (m *machine) Ready() <-chan struct{} { return m.ready }

func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	m.env.point(fmt.Sprintf("dial %d", port))
	select {
	case <-m.done:
		return nil, errors.New("machine is off")
	default:
	}
	conn, err := m.env.peer.Dial(ctx, port)
	return &pointConn{conn, port, m.env}, err
}

// A pointConn tells of each request.
type pointConn struct {
	net.Conn
	port uint32
	env  *env
}

func (c *pointConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.env.point(fmt.Sprintf("write to %d", c.port))
	return n, err
}

func (m *machine) AgentURL(port uint32) string { return fmt.Sprintf("hvsock:///fake:%d", port) }
func (m *machine) Done() <-chan struct{}       { return m.done }
func (m *machine) Err() error                  { return errors.New("qemu: killed: \"last words\"") }
func (m *machine) Console() string             { return "\"last words\"" }
func (m *machine) Examine()                    {}
func (m *machine) Restored() bool              { return m.env.restored }

func (m *machine) Processes() []hypervisor.Process {
	return []hypervisor.Process{m.proc}
}

func (m *machine) PlugNIC(_ context.Context, nic hypervisor.NIC, _, _ []*os.File) (string, error) {
	m.env.point("plug nic " + nic.MAC)
	return "02/01", m.env.plugNIC
}

func (m *machine) UnplugNIC(context.Context, string) error { return nil }

func (m *machine) Kill() error {
	_ = m.cmd.Process.Kill()
	<-m.done
	return nil
}

func (m *machine) Shutdown(context.Context) error {
	m.env.point("shutdown")
	return m.Kill()
}

// An env is what a sandbox is tested in.
type env struct {
	t    testing.TB
	root string
	peer *agenttest.Peer

	// For the test to change before start.
	silent   bool              // the guest never says that it is ready
	restored bool              // the guest goes on from a template
	startVM  func() error      // fails the start of the machine
	plugNIC  error             // of every card
	opts     Options           // of the next sandbox
	point    func(what string) // told of each step that can be seen from outside
	oom      func(id string)   // OnOOM
	program  func(*agenttest.Process) int

	mu       sync.Mutex
	machines []*machine
}

func newEnv(t testing.TB) *env {
	t.Helper()
	need.Root(t)
	e := &env{t: t, root: filepath.Join(t.TempDir(), "run"), point: func(string) {}, oom: func(string) {}}
	e.peer = agenttest.Start(t, agenttest.Options{Program: func(ctx context.Context, p *agenttest.Process) int {
		if e.program != nil {
			return e.program(p)
		}
		<-ctx.Done()
		return 0
	}})
	e.opts = Options{
		ID: "sb", Namespace: "ns", Address: "/run/containerd.sock", Dir: Dir(e.root, "/run/containerd.sock", "ns", "sb"),
		Config: Config{Machine: hypervisor.Spec{VCPUs: 1, MaxVCPUs: 1, MemoryMiB: 256, MaxMemoryMiB: 256}},
	}
	return e
}

func (e *env) start(_ context.Context, _ hypervisor.Spec, opts VMOptions) (Machine, error) {
	e.point("start machine")
	if e.startVM != nil {
		if err := e.startVM(); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command("sleep", "1000")
	cmd.Env = opts.Env
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	m := &machine{env: e, cmd: cmd, ready: make(chan struct{}), done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(m.done)
	}()
	var err error
	if m.proc, err = processOf("qemu", cmd.Process.Pid); err == nil {
		err = opts.Started(m.proc)
	}
	if err != nil {
		_ = m.Kill()
		return nil, err
	}
	e.mu.Lock()
	e.machines = append(e.machines, m)
	e.mu.Unlock()
	e.point("machine started")
	if !e.silent {
		close(m.ready)
	}
	return m, nil
}

// machine is the last one that was started.
func (e *env) machine() *machine {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.machines[len(e.machines)-1]
}

func (e *env) sandbox() *Sandbox {
	e.t.Helper()
	opts := e.opts
	opts.StartVM, opts.OnOOM = e.start, e.oom
	s, err := New(opts)
	if err != nil {
		e.t.Fatal(err)
	}
	return s
}

// running is a sandbox that was started, and is stopped by the end of the test.
func (e *env) running() *Sandbox {
	e.t.Helper()
	s := e.sandbox()
	if err := s.Start(e.t.Context(), testSpec()); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			e.t.Error(err)
		}
		e.clean()
	})
	return s
}

// container creates one, with a root file system of its own.
func (e *env) container(s *Sandbox, id string) *Container {
	e.t.Helper()
	c, err := s.CreateContainer(e.t.Context(), e.config(id))
	if err != nil {
		e.t.Fatal(err)
	}
	return c
}

func (e *env) config(id string) ContainerConfig {
	bundle := filepath.Join(filepath.Dir(e.root), "bundle-"+id)
	if err := os.MkdirAll(filepath.Join(bundle, "rootfs", "etc"), 0o755); err != nil {
		e.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "rootfs", "etc", "id"), []byte(id), 0o644); err != nil {
		e.t.Fatal(err)
	}
	return ContainerConfig{
		ID: id, Bundle: bundle, Spec: testSpec(),
		Streams: agent.StreamSet{Stdin: true, Stdout: true, Stderr: true},
	}
}

// testSpec is what engines make for a plain container.
func testSpec() *specs.Spec {
	return &specs.Spec{
		Version:  "1.2.0",
		Hostname: "box",
		Process: &specs.Process{
			Args: []string{"sh", "-c", "true"}, Env: []string{"PATH=/bin"}, Cwd: "/",
		},
		Root:   &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace},
			{Type: specs.IPCNamespace},
			{Type: specs.UTSNamespace},
			{Type: specs.MountNamespace},
			{Type: specs.NetworkNamespace},
		}},
	}
}

// clean asserts that nothing of the sandbox is left on the host.
func (e *env) clean() {
	e.t.Helper()
	if _, err := os.Stat(e.opts.Dir); !errors.Is(err, fs.ErrNotExist) {
		e.t.Errorf("%s is left: %v", e.opts.Dir, err)
	}
	if found, err := marked(e.opts.Dir); err != nil || len(found) > 0 {
		e.t.Errorf("processes left: %v %v", found, err)
	}
	if infos, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(infos), e.opts.Dir) {
		e.t.Errorf("mounts left: %v\n%s", err, infos)
	}
}

// ended waits for a channel to be closed.
func ended(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s does not end", what)
	}
}

// fails asserts an error's class and text.
func fails(t testing.TB, err, class error, texts ...string) {
	t.Helper()
	if err == nil || class != nil && !errors.Is(err, class) {
		t.Errorf("error %v, want class %v", err, class)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q lacks %q", err, text)
		}
	}
}

func readAll(t testing.TB, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}
