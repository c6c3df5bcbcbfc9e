package guest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// startServer serves on unix sockets, as for tests without a machine.
func startServer(ctx context.Context, t *testing.T) (client *ttrpc.Client, path string, done chan error) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "a")
	ready := make(chan struct{})
	done = make(chan error, 1)
	go func() {
		done <- Serve(ctx, Config{
			Addr: "unix://" + path, Root: filepath.Join(dir, "root"), Version: "1.2",
			Ready: func(context.Context) error { close(ready); return errors.New("nobody listens") },
		})
	}()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	client = ttrpc.NewClient(conn)
	t.Cleanup(func() { client.Close() })
	return client, path, done
}

func TestServe(t *testing.T) {
	client, path, done := startServer(t.Context(), t)
	agent, health := protocol.NewAgentServiceClient(client), protocol.NewHealthClient(client)
	ctx := t.Context()
	if resp, err := health.Check(ctx, &protocol.CheckRequest{}); err != nil || resp.GetStatus() != protocol.HealthCheckResponse_SERVING {
		t.Errorf("check: %v, %v", resp, err)
	}
	if resp, err := health.Version(ctx, &protocol.CheckRequest{}); err != nil || resp.GetAgentVersion() != "1.2" || resp.GetGrpcVersion() == "" {
		t.Errorf("version: %v, %v", resp, err)
	}
	for name, test := range map[string]struct {
		call func() error
		want error
	}{
		"create without a sandbox": {func() error {
			_, err := agent.CreateContainer(ctx, &protocol.CreateContainerRequest{ContainerId: "c"})
			return err
		}, errdefs.ErrFailedPrecondition},
		"bad id": {func() error {
			_, err := agent.CreateContainer(ctx, &protocol.CreateContainerRequest{ContainerId: "../c"})
			return err
		}, errdefs.ErrInvalidArgument},
		"unknown container": {func() error {
			_, err := agent.StatsContainer(ctx, &protocol.StatsContainerRequest{ContainerId: "c"})
			return err
		}, errdefs.ErrNotFound},
		"not there yet": {func() error {
			_, err := agent.SetPolicy(ctx, &protocol.SetPolicyRequest{})
			return err
		}, errdefs.ErrNotImplemented},
		"interface without a name": {func() error {
			_, err := agent.UpdateInterface(ctx, &protocol.UpdateInterfaceRequest{})
			return err
		}, errdefs.ErrInvalidArgument},
		"long hostname": {func() error {
			_, err := agent.CreateSandbox(ctx, &protocol.CreateSandboxRequest{Hostname: string(make([]byte, 65))})
			return err
		}, errdefs.ErrInvalidArgument},
	} {
		if err := errgrpc.ToNative(test.call()); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}

	// A long call ends when the sandbox does, and the stream port closes.
	var long sync.WaitGroup
	long.Go(func() {
		if _, err := agent.GetOOMEvent(ctx, &protocol.GetOOMEventRequest{}); err == nil {
			t.Error("an event of nothing")
		}
	})
	if _, err := agent.DestroySandbox(ctx, &protocol.DestroySandboxRequest{}); err != nil {
		t.Errorf("destroy: %v", err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("serve: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("serve goes on")
	}
	long.Wait()
	if _, err := net.Dial("unix", path+"_1028"); err == nil {
		t.Error("the stream port is still open")
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	_, path, done := startServer(ctx, t)
	conn, err := net.Dial("unix", path+"_1028") // and never says what it wants
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("serve: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("serve goes on")
	}
}

func TestFrames(t *testing.T) {
	message := append([]byte{0, 0, 0, 3, 0, 0, 0, 1, 1, 0}, "abc"...)
	empty := []byte{0, 0, 0, 0, 0, 0, 0, 3, 2, 0}
	all := slices.Concat(message, empty, message, empty, empty)
	for size := 1; size <= len(all); size++ {
		var f frames
		for part := range slices.Chunk(all, size) {
			f.feed(part)
		}
		if f.done != 5 || len(f.head) != 0 {
			t.Errorf("in parts of %d: %d frames", size, f.done)
		}
	}
}

func TestServeWithoutAnAddress(t *testing.T) {
	if err := Serve(t.Context(), Config{Addr: "unix:///nowhere/at/all"}); err == nil {
		t.Error("served nowhere")
	}
}

func TestStorages(t *testing.T) {
	var mounted, unmounted int
	fail := false
	mounters["test"] = func(context.Context, *mountRequest) (func() error, error) {
		if fail {
			return nil, errors.New("no medium")
		}
		mounted++
		return func() error { unmounted++; return nil }, nil
	}
	defer delete(mounters, "test")
	s := newStorages(Config{Root: t.TempDir()}, nil)
	storage := &protocol.Storage{Driver: "test", MountPoint: s.cfg.Root + "/x/"}
	first, err := s.add(t.Context(), storage, "a")
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.add(t.Context(), storage, "b")
	if err != nil {
		t.Fatal(err)
	}
	if err := first(); err != nil || mounted != 1 || unmounted != 0 {
		t.Errorf("%v, mounted %d, unmounted %d", err, mounted, unmounted)
	}
	if err := second(); err != nil || unmounted != 1 || len(s.entries) != 0 {
		t.Errorf("%v, unmounted %d, %d entries", err, unmounted, len(s.entries))
	}
	fail = true
	if _, err := s.add(t.Context(), storage, "a"); err == nil || len(s.entries) != 0 {
		t.Errorf("%v, %d entries", err, len(s.entries))
	}
	if _, err := s.add(t.Context(), &protocol.Storage{Driver: "9p", MountPoint: "/"}, "a"); !errdefs.IsNotImplemented(err) {
		t.Errorf("got %v", err)
	}
	if _, err := s.add(t.Context(), &protocol.Storage{Driver: "test", MountPoint: "/etc"}, "a"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}

func TestLocalStorage(t *testing.T) {
	root := t.TempDir()
	m := &mountRequest{Storage: &protocol.Storage{Options: []string{"mode=0750", "fsgid=0"}}, root: root, rel: "a/b"}
	if _, err := makeLocal(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(root + "/a/b")
	if err != nil || info.Mode().Perm() != 0o770 || info.Mode()&os.ModeSetgid == 0 {
		t.Errorf("got %v, %v", info, err)
	}
	m.Options = []string{"mode=9"}
	if _, err := makeLocal(t.Context(), m); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
	// A link does not lead out.
	if err := os.Symlink("/tmp", root+"/out"); err != nil {
		t.Fatal(err)
	}
	m.rel, m.Options = "out/evil", nil
	if _, err := makeLocal(t.Context(), m); err == nil {
		t.Error("made a directory outside")
	}
}

func TestApplyGroup(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(root+"/v/d", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/v/d/f", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	gid := uint32(os.Getgid())
	for _, policy := range []protocol.FSGroupChangePolicy{protocol.FSGroupChangePolicy_Always, protocol.FSGroupChangePolicy_OnRootMismatch} {
		if err := applyGroup(root, "v", &protocol.FSGroup{GroupId: gid, GroupChangePolicy: policy}); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(root + "/v/d")
		if err != nil || info.Mode()&(os.ModeSetgid|0o070) != os.ModeSetgid|0o070 {
			t.Errorf("got %v, %v", info.Mode(), err)
		}
	}
}

func TestCopyFile(t *testing.T) {
	s := &service{cfg: Config{Root: t.TempDir()}}
	share := s.cfg.shareDir()
	if err := os.MkdirAll(share, 0o755); err != nil {
		t.Fatal(err)
	}
	send := func(path string, mode uint32, size, offset int64, data string) error {
		_, err := s.CopyFile(t.Context(), &protocol.CopyFileRequest{
			Path: path, FileMode: mode, FileSize: size, Offset: offset, Data: []byte(data), Uid: int32(os.Getuid()), Gid: int32(os.Getgid()),
		})
		return err
	}
	for _, err := range []error{
		send(share+"/d", 0o040750, 0, 0, ""),
		send(share+"/d/f", 0o104751, 4, 0, "ab"),
		send(share+"/d/f", 0o104751, 4, 2, "cd"),
		send(share+"/d/empty", 0o100600, 0, 0, ""),
		send(share+"/d/l", 0o120777, 0, 0, "/etc/passwd"),
		send(share+"/d/l", 0o120777, 0, 0, "/etc"),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if b, err := os.ReadFile(share + "/d/f"); err != nil || string(b) != "abcd" {
		t.Errorf("got %q, %v", b, err)
	}
	if info, err := os.Stat(share + "/d/f"); err != nil || info.Mode() != 0o751|os.ModeSetuid {
		t.Errorf("got %v, %v", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(share + "/d"); len(entries) != 3 {
		t.Errorf("got %v", entries)
	}
	for why, err := range map[string]error{
		"outside":            send("/etc/x", 0o100600, 1, 0, "x"),
		"through a link":     send(share+"/d/l/x", 0o100600, 1, 0, "x"),
		"too long":           send(share+"/x", 0o100600, 1, 0, "xx"),
		"negative":           send(share+"/x", 0o100600, 1, -1, "x"),
		"overflow":           send(share+"/x", 0o100600, 1, 1<<63-1, "x"),
		"a device":           send(share+"/x", 0o020600, 0, 0, ""),
		"the share":          send(share, 0o040700, 0, 0, ""),
		"dots in the middle": send(share+"/d/../x", 0o100600, 0, 0, ""),
	} {
		if err == nil {
			t.Errorf("%s: no error", why)
		}
	}
}

func TestOOMQueue(t *testing.T) {
	q := newOOMQueue()
	for _, id := range []string{"a", "b", "a", "c"} {
		q.push(id)
	}
	q.drop("b")
	for _, want := range []string{"a", "c"} {
		if got, err := q.pop(t.Context()); got != want || err != nil {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := q.pop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	// Two wait, two get one each.
	got := make(chan string, 2)
	var waiters sync.WaitGroup
	for range 2 {
		waiters.Go(func() {
			id, err := q.pop(t.Context())
			if err != nil {
				t.Error(err)
			}
			got <- id
		})
	}
	q.push("x")
	q.push("y")
	waiters.Wait()
	if a, b := <-got, <-got; a == b {
		t.Errorf("both got %q", a)
	}
}

func TestOOMCounter(t *testing.T) {
	dir := t.TempDir()
	q := newOOMQueue()
	c := &oomCounter{id: "a", group: cgroup(dir), events: q}
	write := func(n string) {
		t.Helper()
		if err := os.WriteFile(dir+"/memory.events", []byte("oom 9\noom_kill "+n+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c.check() {
		t.Error("killed before there is a group")
	}
	write("0")
	if c.check() || len(q.ids) != 0 {
		t.Error("killed")
	}
	write("2")
	if !c.check() || len(q.ids) != 1 {
		t.Errorf("not killed, %d events", len(q.ids))
	}
	q.drop("a")
	if !c.check() || len(q.ids) != 0 {
		t.Error("told twice")
	}
	if err := os.Remove(dir + "/memory.events"); err != nil {
		t.Fatal(err)
	}
	if !c.check() {
		t.Error("forgotten with the group")
	}
}

func TestWatcher(t *testing.T) {
	w, err := newWatcher()
	if err != nil {
		t.Fatal(err)
	}
	var job sync.WaitGroup
	job.Go(func() {
		if err := w.run(); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(t.TempDir(), "events")
	if _, err := w.add(path, func() {}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	write := func() {
		t.Helper()
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	one, two := make(chan struct{}, 10), make(chan struct{}, 10)
	removeOne, err := w.add(path, func() { one <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	removeTwo, err := w.add(path, func() { two <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	write()
	<-one
	<-two
	removeOne()
	write()
	<-two
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	removeTwo()
	if len(w.funcs) != 0 {
		t.Errorf("left: %v", w.funcs)
	}
	if err := w.close(); err != nil {
		t.Error(err)
	}
	job.Wait()
}

func TestFreezeGivesUp(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"cgroup.events": "populated 1\nfrozen 0\n", "cgroup.freeze": "0\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w, err := newWatcher()
	if err != nil {
		t.Fatal(err)
	}
	var job sync.WaitGroup
	job.Go(func() { _ = w.run() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := cgroup(dir).freeze(ctx, w); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if cgroup(dir).frozen() {
		t.Error("left frozen")
	}
	// And when they do stand still.
	done := make(chan error, 1)
	go func() { done <- cgroup(dir).freeze(t.Context(), w) }()
	for len(done) == 0 {
		time.Sleep(5 * time.Millisecond)
		if err := os.WriteFile(filepath.Join(dir, "cgroup.events"), []byte("frozen 1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	_ = w.close()
	job.Wait()
}

func TestDo(t *testing.T) {
	b := newSandbox(Config{}, nil, nil)
	c := newContainer(b, "c")
	ctx, cancel := context.WithCancel(t.Context())
	hang, undone := make(chan struct{}), make(chan struct{})
	failed := make(chan error, 1)
	go func() {
		failed <- c.do(ctx, func() error { <-hang; return nil }, func() { close(undone) })
	}()
	for !func() bool { // until it runs
		if c.op.tryAcquire() {
			c.op.release()
			return false
		}
		return true
	}() {
		time.Sleep(time.Millisecond)
	}
	// Who comes second waits only as long as he likes, and a kill not at all.
	short, stop := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer stop()
	if err := c.do(short, func() error { t.Error("ran"); return nil }, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if err := c.kill(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(hang)
	<-undone // what succeeded for nobody was undone
	c.jobs.Wait()
	if err := c.do(t.Context(), func() error { return errors.New("x") }, nil); err == nil || err.Error() != "x" {
		t.Errorf("got %v", err)
	}
	c.jobs.Wait()
}

func TestStates(t *testing.T) {
	c := newContainer(newSandbox(Config{}, nil, nil), "c")
	for _, step := range []struct {
		to state
		ok bool
	}{{paused, false}, {created, true}, {paused, false}, {running, true}, {created, false}, {paused, true}, {running, true}, {stopped, true}, {running, false}, {removed, true}} {
		if err := c.to(step.to); (err == nil) != step.ok {
			t.Errorf("from %v to %v: %v", c.state, step.to, err)
		}
	}
}
