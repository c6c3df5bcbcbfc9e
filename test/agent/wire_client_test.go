package agent_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
	"github.com/vmshim/vmshim/test/agent/plain"
)

// wireProgram is what processes of the plain agent do.
func wireProgram(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	switch args[0] {
	case "cat":
		n, err := io.Copy(stdout, stdin)
		if err != nil {
			return 1
		}
		_, _ = fmt.Fprintf(stderr, "%d bytes\n", n)
	case "exit":
		code, _ := strconv.Atoi(args[1])
		return code
	case "sleep":
		_, _ = io.Copy(io.Discard, stdin) // until it is killed
	}
	return 0
}

// wireClient is the project's client of a plain agent.
func wireClient(t *testing.T, change func(*plain.Server)) (*agent.Client, *plain.Server) {
	t.Helper()
	server := plain.NewServer(wireProgram)
	if change != nil {
		change(server)
	}
	client := agent.New(agent.Settings{Dial: func(_ context.Context, port uint32) (net.Conn, error) {
		if port != 1024 {
			return nil, fmt.Errorf("port %d: connection refused", port)
		}
		host, guest := net.Pipe()
		server.Serve(guest)
		return host, nil
	}})
	t.Cleanup(func() {
		client.MarkDead(errors.New("test is over"))
		server.Close()
	})
	return client, server
}

func wireContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func wireClass(t *testing.T, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: got %v, want %v", what, err, class)
	}
}

// A container's whole life, with an agent that never heard of this project.
func TestWireClientLife(t *testing.T) {
	c, server := wireClient(t, nil)
	ctx := wireContext(t)
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	caps, err := c.Capabilities(ctx)
	must("capabilities", err)
	if caps.Extension || caps.ByteStreams || !caps.BlockDevices || !caps.SharedFS {
		t.Errorf("capabilities %+v", caps)
	}
	must("start sandbox", c.StartSandbox(ctx, agent.Sandbox{
		Request:    &protocol.CreateSandboxRequest{Hostname: "pod", SandboxId: "pod", Dns: []string{"nameserver 1.2.3.4"}},
		Interfaces: []*types.Interface{{Name: "eth0", HwAddr: "02:00:00:00:00:01", Mtu: 1400, IPAddresses: []*types.IPAddress{{Family: types.IPFamily_v4, Address: "10.0.0.2", Mask: "24"}}}},
		Routes:     []*types.Route{{Gateway: "10.0.0.1", Device: "eth0"}},
	}))
	// What arrived, by the numbers of the protocol.
	iface := server.Calls("UpdateInterface")[0].Req.Sub(1)
	if iface.Str(2) != "eth0" || iface.Str(5) != "02:00:00:00:00:01" || iface.Int(4) != 1400 || iface.Sub(3).Str(2) != "10.0.0.2" || iface.Sub(3).Str(3) != "24" {
		t.Errorf("interface %v", iface)
	}
	if r := server.Calls("CreateSandbox")[0].Req; r.Str(1) != "pod" || r.Str(2) != "nameserver 1.2.3.4" || r.Str(5) != "pod" {
		t.Errorf("sandbox %v", r)
	}
	wireClass(t, "second sandbox", c.StartSandbox(ctx, agent.Sandbox{Request: &protocol.CreateSandboxRequest{}}), errdefs.ErrAlreadyExists)

	must("create", c.CreateContainer(ctx, &protocol.CreateContainerRequest{
		ContainerId: "c", ExecId: "c", NoStdin: false,
		OCI: &protocol.Spec{Process: &protocol.Process{Args: []string{"cat"}, User: &protocol.User{}}},
	}))
	std, err := c.Streams(ctx, "c", "c", agent.StreamSet{Stdin: true, Stdout: true, Stderr: true})
	must("streams", err)
	must("start", c.StartContainer(ctx, "c"))
	data := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB: many calls
	var jobs sync.WaitGroup
	jobs.Go(func() {
		_, err := io.WriteString(std.Stdin, data)
		if err := errors.Join(err, std.Stdin.Close()); err != nil {
			t.Errorf("stdin: %v", err)
		}
	})
	out, err := io.ReadAll(std.Stdout)
	if err != nil || sha256.Sum256(out) != sha256.Sum256([]byte(data)) {
		t.Errorf("stdout: %d bytes of %d, %v", len(out), len(data), err)
	}
	if text, err := io.ReadAll(std.Stderr); err != nil || string(text) != fmt.Sprintf("%d bytes\n", len(data)) {
		t.Errorf("stderr: %q, %v", text, err)
	}
	jobs.Wait()
	for range 3 { // early or late, once or thrice: the client keeps it
		if st, err := c.WaitProcess(ctx, "c", "c"); err != nil || st.Code != 0 {
			t.Errorf("wait: %+v, %v", st, err)
		}
	}
	if n := len(server.Calls("WaitProcess")); n != 1 {
		t.Errorf("%d waits were sent", n)
	}

	must("exec", c.Exec(ctx, &protocol.ExecProcessRequest{ContainerId: "c", ExecId: "e", Process: &protocol.Process{Args: []string{"exit", "5"}}}))
	if st, err := c.WaitProcess(ctx, "c", "e"); err != nil || st.Code != 5 {
		t.Errorf("wait for exec: %+v, %v", st, err)
	}
	must("exec", c.Exec(ctx, &protocol.ExecProcessRequest{ContainerId: "c", ExecId: "s", Process: &protocol.Process{Args: []string{"sleep"}}}))
	must("signal", c.SignalProcess(ctx, "c", "s", 9, false))
	if st, err := c.WaitProcess(ctx, "c", "s"); err != nil || st.Code != 137 {
		t.Errorf("wait for killed exec: %+v, %v", st, err)
	}
	wireClass(t, "signal afterwards", c.SignalProcess(ctx, "c", "s", 9, false), errdefs.ErrNotFound)

	stats, err := c.StatsContainer(ctx, "c")
	if err != nil || stats.GetCgroupStats().GetPidsStats().GetCurrent() != 7 {
		t.Errorf("stats with fields of another version: %v, %v", stats, err)
	}
	must("signal all", c.SignalProcess(ctx, "c", "", 9, true))
	if calls := server.Calls("SignalProcess"); calls[len(calls)-1].Req.Str(2) != "" {
		t.Errorf("signal for all: %v", calls[len(calls)-1].Req)
	}
	must("stop", c.StopContainer(ctx, "c"))
	must("stop again", c.StopContainer(ctx, "c"))
	_, err = c.WaitProcess(ctx, "c", "c")
	wireClass(t, "wait for what was removed", err, errdefs.ErrNotFound)
	must("stop sandbox", c.StopSandbox(ctx))
}

// What the agent does not know is not implemented, whichever ttrpc it is built with.
func TestWireClientUnknownMethods(t *testing.T) {
	for _, rust := range []bool{false, true} {
		c, server := wireClient(t, func(s *plain.Server) { s.Rust = rust })
		ctx := wireContext(t)
		_, err := c.Pids(ctx, "c")
		wireClass(t, "pids", err, errdefs.ErrNotImplemented)
		_, err = c.IPTables(ctx, false)
		wireClass(t, "iptables", err, errdefs.ErrNotImplemented)
		wireClass(t, "resize", c.ResizeGuestVolume(ctx, "/x", 1), errdefs.ErrNotImplemented)
		_, _, err = c.Version(ctx)
		if err != nil {
			t.Errorf("version: %v", err)
		}
		if calls := server.Calls("Pids"); len(calls) != 0 {
			t.Error("a call of the extension was sent to an agent that announces none")
		}
	}
}

// Answers come in any order, and too late.
func TestWireClientOrder(t *testing.T) {
	const n = 8
	release := make([]chan struct{}, n+1)
	for i := range release {
		release[i] = make(chan struct{})
	}
	arrived := make(chan int, n+1)
	c, _ := wireClient(t, func(s *plain.Server) {
		s.Before = func(method string, req plain.Fields) {
			if method == "UpdateInterface" {
				i, _ := strconv.Atoi(req.Sub(1).Str(2))
				arrived <- i
				<-release[i]
			}
		}
	})
	late, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.UpdateInterface(late, &types.Interface{Name: strconv.Itoa(n)})
	wireClass(t, "a call without an answer", err, context.DeadlineExceeded)
	<-arrived

	answers := make([]chan string, n)
	for i := range answers {
		answers[i] = make(chan string, 1)
		go func() {
			iface, err := c.UpdateInterface(wireContext(t), &types.Interface{Name: strconv.Itoa(i)})
			answers[i] <- fmt.Sprint(iface.GetName(), err)
		}()
	}
	for range answers {
		<-arrived
	}
	close(release[n]) // the late one, in between
	for i := n - 1; i >= 0; i-- {
		close(release[i])
		if got := <-answers[i]; got != strconv.Itoa(i)+"<nil>" {
			t.Errorf("call %d got %q", i, got)
		}
	}
	if err := c.Check(wireContext(t)); err != nil {
		t.Error(err)
	}
}
