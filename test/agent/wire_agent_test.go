package agent_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	guestagent "github.com/vmshim/vmshim/internal/guest"
	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/test/agent/plain"
)

// A wireHost is a host that knows the plain protocol, and its test.
type wireHost struct {
	*plain.Client
	t *testing.T
}

func (h wireHost) call(method string, req plain.Msg) (plain.Fields, error) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), vmtest.Within(time.Minute))
	defer cancel()
	return h.Call(ctx, plain.Agent, method, req)
}

func (h wireHost) must(method string, req plain.Msg) plain.Fields {
	h.t.Helper()
	answer, err := h.call(method, req)
	if err != nil {
		h.t.Fatal(err)
	}
	return answer
}

func (h wireHost) refused(what, method string, req plain.Msg, code uint64) {
	h.t.Helper()
	_, err := h.call(method, req)
	if st := (*plain.Status)(nil); !errors.As(err, &st) || st.Code != code {
		h.t.Errorf("%s: got %v, want code %d", what, err, code)
	}
}

func (h wireHost) on(t *testing.T) wireHost { return wireHost{h.Client, t} }

// The agent as a process of the host: what needs no container.
func TestWireAgent(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	root, path := filepath.Join(dir, "root"), filepath.Join(dir, "a")
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- guestagent.Serve(t.Context(), guestagent.Config{
			Addr: "unix://" + path, Root: root, Version: "1.2",
			Ready: func(context.Context) error { close(ready); return nil },
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
	h := wireHost{plain.NewClient(conn), t}
	defer h.Close()
	h.Metadata = map[string]string{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "": ""}

	wireHealth(h)
	for _, method := range []string{"StartContainer", "RemoveContainer", "SignalProcess", "WaitProcess", "StatsContainer", "PauseContainer", "ReadStdout", "CloseStdin", "TtyWinResize"} {
		// Fields of all kinds that only another version knows.
		h.refused("nobody", method, plain.Msg{}.Str(1, "nobody").Int(3, 9).Int(1000, 1).Str(1001, "x").Sub(1002, plain.Msg{}.Int(1, 1)), plain.NotFound)
	}
	h.refused("before there is a sandbox", "CreateContainer", plain.Msg{}.Str(1, "c").Str(2, "c"), plain.FailedPrecondition)
	h.refused("bad id", "CreateContainer", plain.Msg{}.Str(1, "../c").Str(2, "c"), plain.InvalidArgument)
	h.refused("no message", "StatsContainer", plain.Msg("\xff\xff\xff"), plain.InvalidArgument)
	h.refused("unknown method", "PullImage", nil, plain.Unimplemented)
	if _, err := h.Call(wireContext(t), "grpc.Nothing", "Check", nil); err == nil {
		t.Error("an unknown service answers")
	}

	h.must("CreateSandbox", plain.Msg{}.Str(1, "pod").Str(5, "pod"))
	h.refused("a second sandbox", "CreateSandbox", plain.Msg{}.Str(1, "pod").Str(5, "pod"), plain.AlreadyExists)

	wireCopyFile(h, filepath.Join(root, "shared/containers"), filepath.Join(root, "shared/containers"))

	// A call that waits for an event holds up no other one, and ends with the sandbox.
	long := make(chan error, 1)
	go func() {
		_, err := h.call("GetOOMEvent", nil)
		long <- err
	}()
	for range 10 {
		wireHealth(h)
	}
	select {
	case err := <-long:
		t.Errorf("an event of nothing: %v", err)
	default:
	}
	h.must("DestroySandbox", nil)
	if err := <-long; err == nil {
		t.Error("an event of nothing at the end")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func wireHealth(h wireHost) {
	h.t.Helper()
	if answer, err := h.Call(wireContext(h.t), plain.Health, "Check", plain.Msg{}.Str(1, "grpc.AgentService")); err != nil || answer.Int(1) != 1 {
		h.t.Errorf("check: %v, %v", answer, err)
	}
	if answer, err := h.Call(wireContext(h.t), plain.Health, "Version", nil); err != nil || answer.Str(1) == "" || answer.Str(2) == "" {
		h.t.Errorf("version: %v, %v", answer, err)
	}
}

// wireCopyFile sends a file in pieces, a directory and links to the share, which
// the host sees at seen.
func wireCopyFile(h wireHost, share, seen string) {
	t := h.t
	t.Helper()
	const mib = 1 << 20
	data := strings.Repeat("0123456789abcdef", mib/16*5/2)
	file := func(mode uint64, name string) plain.Msg {
		return plain.Msg{}.Str(1, filepath.Join(share, name)).Int(3, mode).Int(4, 0o750).Int(5, 5).Int(6, 6)
	}
	for off := 0; off < len(data); off += mib {
		if _, err := os.Stat(filepath.Join(seen, "wire/d/f")); err == nil {
			t.Error("half a file is there")
		}
		piece := data[off:min(off+mib, len(data))]
		h.must("CopyFile", file(0o100640, "wire/d/f").Int(2, uint64(len(data))).Int(7, uint64(off)).Str(8, piece))
	}
	got, err := os.ReadFile(filepath.Join(seen, "wire/d/f"))
	if err != nil || string(got) != data {
		t.Errorf("copied %d bytes of %d, %v", len(got), len(data), err)
	}
	if info, err := os.Stat(filepath.Join(seen, "wire/d")); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("directory above: %v, %v", info, err)
	}
	h.must("CopyFile", file(0o040711, "wire/e"))
	h.must("CopyFile", file(0o120777, "wire/dangling").Str(8, "nowhere/at/all"))
	if to, err := os.Readlink(filepath.Join(seen, "wire/dangling")); err != nil || to != "nowhere/at/all" {
		t.Errorf("dangling link: %q, %v", to, err)
	}
	h.refused("outside", "CopyFile", plain.Msg{}.Str(1, "/etc/x").Int(3, 0o100640), plain.InvalidArgument)
	h.refused("more than the file has", "CopyFile", file(0o100640, "wire/g").Int(2, 1).Str(8, "xx"), plain.InvalidArgument)
}
