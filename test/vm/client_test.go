package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

const clientBytes = 20 << 20

// A guest is a machine as pkg/agent sees it.
type guest struct {
	*agent.Client
	t         *testing.T
	m         *vmtest.Machine
	rawstream string // the program
}

const guestShare = "/run/kata-containers/shared/containers/"

// startGuest boots a machine and a sandbox in it.
func startGuest(t *testing.T) *guest {
	t.Helper()
	m := vmtest.Resume(t)
	g := &guest{
		Client:    agent.New(agent.Settings{Dial: m.Dial, URL: m.AgentURL(1024)}),
		t:         t,
		m:         m,
		rawstream: buildRawstream(t),
	}
	t.Cleanup(func() { g.MarkDead(errors.New("test is over")) })
	err := g.StartSandbox(vmtest.Context(t), agent.Sandbox{Request: &protocol.CreateSandboxRequest{
		Hostname: "pod", SandboxId: "pod",
		Storages: []*protocol.Storage{{Driver: "virtio-fs", Source: "kataShared", Fstype: "virtiofs", MountPoint: guestShare}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// on is the same guest for a part of the test.
func (g *guest) on(t *testing.T) *guest {
	part := *g
	part.t = t
	return &part
}

// create makes a container that has busybox and rawstream; it is removed with the test.
func (g *guest) create(id string, args ...string) {
	g.t.Helper()
	root := filepath.Join(g.m.Share, id, "rootfs")
	for _, dir := range []string{"bin", "proc", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			g.t.Fatal(err)
		}
	}
	install(g.t, "/bin/busybox", filepath.Join(root, "bin/busybox"))
	install(g.t, g.rawstream, filepath.Join(root, "bin/rawstream"))
	for _, name := range []string{"sh", "cat", "sleep"} {
		_ = os.Symlink("busybox", filepath.Join(root, "bin", name))
	}
	err := g.CreateContainer(vmtest.Context(g.t), &protocol.CreateContainerRequest{
		ContainerId: id, ExecId: id,
		OCI: &protocol.Spec{
			Version: "1.0.2", Process: command(args...),
			Root: &protocol.Root{Path: guestShare + id + "/rootfs"},
			Mounts: []*protocol.Mount{
				{Destination: "/proc", Type: "proc", Source: "proc"},
				{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
			},
			Linux: &protocol.Linux{
				Namespaces: []*protocol.LinuxNamespace{{Type: "mount"}, {Type: "pid"}},
				Resources:  &protocol.LinuxResources{},
			},
		},
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), vmtest.Timeout)
		defer cancel()
		if err := g.StopContainer(ctx, id); err != nil {
			g.t.Error(err)
		}
	})
}

func command(args ...string) *protocol.Process {
	return &protocol.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}, User: &protocol.User{}}
}

func install(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// buildRawstream builds the program that the containers have.
func buildRawstream(t *testing.T) string {
	t.Helper()
	return buildProgram(t, "rawstream")
}

// buildProgram builds a program for containers of the directory of that name.
func buildProgram(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	cmd := exec.Command("go", "build", "-o", path, "./"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func (g *guest) streams(id, execID string) *agent.Streams {
	g.t.Helper()
	s, err := g.Streams(vmtest.Context(g.t), id, execID, agent.StreamSet{Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		g.t.Fatal(err)
	}
	return s
}

func (g *guest) start(id string) {
	g.t.Helper()
	if err := g.StartContainer(vmtest.Context(g.t), id); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) exits(id, execID string, code int32) {
	g.t.Helper()
	exit, err := g.WaitProcess(vmtest.Context(g.t), id, execID)
	if err != nil || exit.Code != code {
		g.t.Errorf("got %+v, %v, want code %d", exit, err, code)
	}
	if d := time.Since(exit.ExitedAt).Abs(); err == nil && d > time.Minute {
		g.t.Errorf("exited %v ago", d)
	}
}

// TestVMClient drives a guest through pkg/agent. One machine serves all parts.
func TestVMClient(t *testing.T) {
	g := startGuest(t)
	for _, part := range []struct {
		name string
		test func(*guest)
	}{
		{"capabilities", clientCapabilities},
		{"streams", clientStreams},
		{"plain streams", clientPlainStreams},
		{"short output", clientShortOutput},
		{"blocked stdin", clientBlockedStdin},
		{"exits", clientExits},
		{"exec", clientExec},
		{"lost connection", clientLostConnection},
		{"throughput", clientThroughput},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(g.on(t)) })
	}
	if err := g.StopSandbox(vmtest.Context(t)); err != nil {
		t.Errorf("stop sandbox: %v", err)
	}
	select {
	case <-g.m.Done():
	case <-time.After(vmtest.Within(30 * time.Second)):
		t.Error("the guest did not power off")
	}
	start := time.Now()
	if err := g.Check(vmtest.Context(t)); !errdefs.IsUnavailable(err) {
		t.Errorf("check of a machine that is off: %v", err)
	}
	t.Logf("noticed after %v", time.Since(start))
}

func clientCapabilities(g *guest) {
	caps, err := g.Capabilities(vmtest.Context(g.t))
	if err != nil || !caps.Extension || !caps.ByteStreams || !caps.SharedFS || !caps.BlockDevices || caps.Version == "" {
		g.t.Errorf("got %+v, %v", caps, err)
	}
	if _, v, err := g.Version(vmtest.Context(g.t)); v != caps.Version || err != nil {
		g.t.Errorf("got version %q, %v, want %q", v, err, caps.Version)
	}
}

func noise() []byte {
	b := make([]byte, clientBytes)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(b)
	return b
}

// 20 MiB go in and out at once, unchanged.
func clientStreams(g *guest) {
	data := noise()
	g.create("c", "/bin/cat")
	s := g.streams("c", "")
	g.start("c")
	start := time.Now()
	var jobs sync.WaitGroup
	jobs.Go(func() {
		if _, err := s.Stdin.Write(data); err != nil {
			g.t.Errorf("stdin: %v", err)
		}
		if err := s.Stdin.Close(); err != nil {
			g.t.Errorf("close stdin: %v", err)
		}
	})
	sum := crc32.NewIEEE()
	n, err := io.Copy(sum, s.Stdout)
	if n != clientBytes || err != nil || sum.Sum32() != crc32.ChecksumIEEE(data) {
		g.t.Errorf("got %d bytes, crc %x, %v", n, sum.Sum32(), err)
	}
	jobs.Wait()
	g.t.Logf("20 MiB both ways in %v", time.Since(start))
	g.exits("c", "", 0)
	if b, err := io.ReadAll(s.Stderr); len(b) != 0 || err != nil {
		g.t.Errorf("stderr: %q, %v", b, err)
	}
}

// The same by the protocol's own calls.
func clientPlainStreams(g *guest) {
	data := noise()[:4<<20]
	g.create("c", "/bin/cat")
	g.start("c")
	ctx := vmtest.Context(g.t)
	var jobs sync.WaitGroup
	jobs.Go(func() {
		if n, err := g.WriteProcessStdin(ctx, "c", "", data); n != len(data) || err != nil {
			g.t.Errorf("stdin: %d bytes, %v", n, err)
		}
		if err := g.CloseProcessStdin(ctx, "c", ""); err != nil {
			g.t.Errorf("close stdin: %v", err)
		}
	})
	var got bytes.Buffer
	buf := make([]byte, 10000)
	for {
		n, err := g.ReadProcessStdout(ctx, "c", "", buf)
		got.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			g.t.Fatal(err)
		}
	}
	jobs.Wait()
	if !bytes.Equal(got.Bytes(), data) {
		g.t.Errorf("got %d bytes, want %d", got.Len(), len(data))
	}
	g.exits("c", "", 0)
}

// A process that ends at once: its output is whole, read late and after the exit.
func clientShortOutput(g *guest) {
	for range 5 {
		g.create("c", "/bin/sh", "-c", "head -c 60000 /dev/zero; echo bad >&2; exit 3")
		s := g.streams("c", "")
		g.start("c")
		g.exits("c", "", 3)
		if b, err := io.ReadAll(s.Stdout); len(b) != 60000 || err != nil {
			g.t.Errorf("stdout: %d bytes, %v", len(b), err)
		}
		if b, err := io.ReadAll(s.Stderr); string(b) != "bad\n" || err != nil {
			g.t.Errorf("stderr: %q, %v", b, err)
		}
		if err := g.StopContainer(vmtest.Context(g.t), "c"); err != nil {
			g.t.Error(err)
		}
	}
}

// A write to a process that does not read waits; Close and the process' end end it.
func clientBlockedStdin(g *guest) {
	g.create("c", "/bin/sleep", "1000")
	s := g.streams("c", "")
	g.start("c")
	written := make(chan error, 1)
	go func() {
		_, err := s.Stdin.Write(noise())
		written <- err
	}()
	select {
	case err := <-written:
		g.t.Errorf("20 MiB went to a process that sleeps: %v", err)
	case <-time.After(2 * time.Second):
	}
	before := g.switches()
	select {
	case err := <-written:
		g.t.Errorf("20 MiB went to a process that sleeps: %v", err)
	case <-time.After(2 * time.Second):
	}
	// Of a machine that has nothing to do there are a few dozen; of one whose vsock
	// asks for room all the time, thousands.
	if n := g.switches() - before; n > 1000 {
		g.t.Errorf("the machine's threads ran %d times in 2 s, for a process that does not read", n)
	}
	start := time.Now()
	if err := g.Check(vmtest.Context(g.t)); err != nil || time.Since(start) > vmtest.Within(5*time.Second) {
		g.t.Errorf("check beside a blocked stream: %v after %v", err, time.Since(start))
	}
	if err := g.SignalProcess(vmtest.Context(g.t), "c", "", 9, false); err != nil {
		g.t.Fatal(err)
	}
	select {
	case err := <-written:
		if !errors.Is(err, io.ErrClosedPipe) {
			g.t.Errorf("write to a process that was killed: %v", err)
		}
	case <-time.After(vmtest.Within(20 * time.Second)):
		g.t.Error("write hangs although the process was killed")
		_ = s.Close()
	}
	g.exits("c", "", 137)
}

// switches is how often threads of the machine's processes have given their
// processor back.
func (g *guest) switches() (n int) {
	g.t.Helper()
	for _, p := range g.m.Processes() {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.PID))
		if err != nil || len(threads) == 0 {
			g.t.Fatalf("threads of %s: %v", p.Role, err)
		}
		for _, file := range threads {
			status, err := os.ReadFile(file)
			if err != nil {
				continue // it has ended
			}
			_, after, _ := strings.Cut(string(status), "\nvoluntary_ctxt_switches:")
			k, err := strconv.Atoi(strings.Fields(after)[0])
			if err != nil {
				g.t.Fatal(err)
			}
			n += k
		}
	}
	g.t.Logf("%d switches", n)
	return n
}

func clientExits(g *guest) {
	for _, tt := range []struct {
		args []string
		code int32
	}{
		{[]string{"/bin/sh", "-c", "exit 0"}, 0},
		{[]string{"/bin/sh", "-c", "exit 1"}, 1},
		{[]string{"/bin/sh", "-c", "nosuchcommand"}, 127},
	} {
		g.create("c", tt.args...)
		var jobs sync.WaitGroup
		for range 3 {
			jobs.Go(func() { g.exits("c", "", tt.code) })
		}
		g.start("c")
		jobs.Wait()
		g.exits("c", "", tt.code) // late
		if err := g.StopContainer(vmtest.Context(g.t), "c"); err != nil {
			g.t.Error(err)
		}
	}
	if _, err := g.WaitProcess(vmtest.Context(g.t), "c", ""); !errdefs.IsNotFound(err) {
		g.t.Errorf("wait after remove: %v", err)
	}
	if err := g.StopContainer(vmtest.Context(g.t), "c"); err != nil {
		g.t.Errorf("second stop: %v", err)
	}
}

// Execs in a running container, and what kills them.
func clientExec(g *guest) {
	g.create("c", "/bin/sleep", "1000")
	g.start("c")
	exec := func(id string, args ...string) *agent.Streams {
		err := g.Exec(vmtest.Context(g.t), &protocol.ExecProcessRequest{ContainerId: "c", ExecId: id, Process: command(args...)})
		if err != nil {
			g.t.Fatal(err)
		}
		return g.streams("c", id)
	}
	s := exec("echo", "/bin/sh", "-c", "read x; echo got $x")
	fmt.Fprintln(s.Stdin, "it")
	if b, err := io.ReadAll(s.Stdout); string(b) != "got it\n" || err != nil {
		g.t.Errorf("got %q, %v", b, err)
	}
	g.exits("c", "echo", 0)
	g.ForgetProcess("c", "echo")

	exec("term", "/bin/sleep", "1000")
	pids, err := g.Pids(vmtest.Context(g.t), "c")
	var ids []string
	for _, p := range pids {
		ids = append(ids, p.GetExecId())
	}
	if got := strings.Join(ids, " "); err != nil || (got != "c term" && got != "term c") {
		g.t.Errorf("got processes %q, %v", got, err)
	}
	if err := g.SignalProcess(vmtest.Context(g.t), "c", "term", 15, false); err != nil {
		g.t.Fatal(err)
	}
	g.exits("c", "term", 143)
	if err := g.SignalProcess(vmtest.Context(g.t), "c", "term", 15, false); !errdefs.IsNotFound(err) {
		g.t.Errorf("signal after exit: %v", err)
	}
	if err := g.SignalProcess(vmtest.Context(g.t), "c", "nobody", 15, false); !errdefs.IsNotFound(err) {
		g.t.Errorf("signal to nobody: %v", err)
	}
	err = g.Exec(vmtest.Context(g.t), &protocol.ExecProcessRequest{ContainerId: "c", ExecId: "missing", Process: command("/nosuch")})
	if err == nil {
		g.t.Error("exec of what is not there succeeded")
	}
	g.t.Log(err)
	if err := g.SignalProcess(vmtest.Context(g.t), "c", "", 9, true); err != nil {
		g.t.Fatal(err)
	}
	g.exits("c", "", 137)
}

// A wait goes on over a new connection.
func clientLostConnection(g *guest) {
	g.create("c", "/bin/cat")
	s := g.streams("c", "")
	g.start("c")
	cut := make(chan error, 1)
	go func() {
		_, err := g.WaitProcess(vmtest.Context(g.t), "c", "")
		cut <- err
	}()
	if err := g.Check(vmtest.Context(g.t)); err != nil {
		g.t.Error(err)
	}
	if err := g.Disconnect(); err != nil {
		g.t.Error(err)
	}
	if err := <-cut; !errdefs.IsUnavailable(err) {
		g.t.Errorf("wait: %v", err)
	}
	if _, err := s.Stdout.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		g.t.Errorf("stdout: %v", err)
	}
	var again *agent.Streams
	var err error
	for range 100 { // until the guest has noticed as well
		if again, err = g.Streams(vmtest.Context(g.t), "c", "", agent.StreamSet{Stdin: true, Stdout: true}); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	fmt.Fprint(again.Stdin, "hello")
	if err := again.Stdin.Close(); err != nil {
		g.t.Error(err)
	}
	if b, err := io.ReadAll(again.Stdout); string(b) != "hello" || err != nil {
		g.t.Errorf("got %q, %v", b, err)
	}
	g.exits("c", "", 0)
}

// clientThroughput measures the streams against the transport under them. It
// only says what it saw: a machine that is shared and emulates is no judge.
func clientThroughput(g *guest) {
	const port = 5555
	rate := func(d time.Duration) float64 { return clientBytes / d.Seconds() / (1 << 20) }
	best := map[string]float64{}
	note := func(name string, d time.Duration) { best[name] = max(best[name], rate(d)) }
	zeros := make([]byte, clientBytes)
	for range 2 {
		g.create("raw", "/bin/rawstream", "listen", fmt.Sprint(port), fmt.Sprint(clientBytes))
		s := g.streams("raw", "")
		g.start("raw")
		if _, err := io.ReadFull(s.Stdout, make([]byte, len("listening\n"))); err != nil {
			b, _ := io.ReadAll(s.Stderr)
			g.t.Fatalf("%v: %s", err, b)
		}
		conn, err := g.m.Dial(vmtest.Context(g.t), port)
		if err != nil {
			g.t.Fatal(err)
		}
		start := time.Now()
		if n, err := io.CopyN(io.Discard, conn, clientBytes); err != nil {
			g.t.Fatalf("%d bytes, %v", n, err)
		}
		note("raw out", time.Since(start))
		_ = conn.Close()
		if conn, err = g.m.Dial(vmtest.Context(g.t), port); err != nil {
			g.t.Fatal(err)
		}
		start = time.Now()
		if _, err := conn.Write(zeros); err != nil {
			g.t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			g.t.Fatal(err)
		}
		note("raw in", time.Since(start))
		_ = conn.Close()
		g.exits("raw", "", 0)
		if err := g.StopContainer(vmtest.Context(g.t), "raw"); err != nil {
			g.t.Error(err)
		}

		g.create("c", "/bin/rawstream", "write", fmt.Sprint(clientBytes))
		s = g.streams("c", "")
		g.start("c")
		first := make([]byte, 1)
		if _, err := io.ReadFull(s.Stdout, first); err != nil {
			g.t.Fatal(err)
		}
		start = time.Now()
		if n, err := io.Copy(io.Discard, s.Stdout); n != clientBytes-1 || err != nil {
			g.t.Fatalf("%d bytes, %v", n, err)
		}
		note("stdout", time.Since(start))
		if err := g.StopContainer(vmtest.Context(g.t), "c"); err != nil {
			g.t.Error(err)
		}

		g.create("c", "/bin/rawstream", "read")
		s = g.streams("c", "")
		g.start("c")
		if _, err := s.Stdin.Write(zeros[:1]); err != nil {
			g.t.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond) // it runs now
		start = time.Now()
		if _, err := s.Stdin.Write(zeros[1:]); err != nil {
			g.t.Fatal(err)
		}
		if err := s.Stdin.Close(); err != nil {
			g.t.Error(err)
		}
		if b, err := io.ReadAll(s.Stdout); strings.TrimSpace(string(b)) != fmt.Sprint(clientBytes) || err != nil {
			g.t.Errorf("got %q, %v", b, err)
		}
		note("stdin", time.Since(start))
		if err := g.StopContainer(vmtest.Context(g.t), "c"); err != nil {
			g.t.Error(err)
		}
	}
	g.t.Logf("MiB/s: stdout %.0f of %.0f raw, stdin %.0f of %.0f raw", best["stdout"], best["raw out"], best["stdin"], best["raw in"])
}
