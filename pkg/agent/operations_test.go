package agent

import (
	"context"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// An operation and what it sends, and what comes back.
type operation struct {
	name   string
	call   func(context.Context, *Client) (any, error)
	method string
	req    proto.Message
	answer proto.Message // nil: Empty
	want   any
}

func nothing(err error) (any, error) { return nil, err }

var operations = []operation{
	{
		name:   "Check",
		call:   func(ctx context.Context, c *Client) (any, error) { return nothing(c.Check(ctx)) },
		method: "Check", req: &protocol.CheckRequest{},
		answer: &protocol.HealthCheckResponse{Status: protocol.HealthCheckResponse_SERVING},
	},
	{
		name: "Version",
		call: func(ctx context.Context, c *Client) (any, error) {
			api, agent, err := c.Version(ctx)
			return [2]string{api, agent}, err
		},
		method: "Version", req: &protocol.CheckRequest{},
		answer: &protocol.VersionCheckResponse{GrpcVersion: "0.0.1", AgentVersion: "9"},
		want:   [2]string{"0.0.1", "9"},
	},
	{
		name:   "Capabilities",
		call:   func(ctx context.Context, c *Client) (any, error) { return c.Capabilities(ctx) },
		method: "GetGuestDetails", req: &protocol.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true},
		answer: &protocol.GuestDetailsResponse{AgentDetails: &protocol.AgentDetails{
			Version: "9", SupportsSeccomp: true,
			StorageHandlers: []string{"blk", "virtio-fs"}, DeviceHandlers: []string{"vfio-pci"},
			ExtraFeatures: []string{extension.FeatureStreams, "somebody.else"},
		}},
		want: Capabilities{
			Version: "9", Seccomp: true, ByteStreams: true, BlockDevices: true, SharedFS: true,
			Storages: []string{"blk", "virtio-fs"}, Devices: []string{"vfio-pci"},
		},
	},
	{
		name: "StopSandbox", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.StopSandbox(ctx)) },
		method: "DestroySandbox", req: &protocol.DestroySandboxRequest{},
	},
	{
		name: "CreateContainer",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.CreateContainer(ctx, &protocol.CreateContainerRequest{ContainerId: "c", ExecId: "c", NoStdin: true}))
		},
		method: "CreateContainer", req: &protocol.CreateContainerRequest{ContainerId: "c", ExecId: "c", NoStdin: true},
	},
	{
		name: "StartContainer", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.StartContainer(ctx, "c")) },
		method: "StartContainer", req: &protocol.StartContainerRequest{ContainerId: "c"},
	},
	{
		name: "StopContainer", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.StopContainer(ctx, "c")) },
		method: "RemoveContainer", req: &protocol.RemoveContainerRequest{ContainerId: "c"},
	},
	{
		name: "UpdateContainer",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.UpdateContainer(ctx, "c", &protocol.LinuxResources{Pids: &protocol.LinuxPids{Limit: 7}}))
		},
		method: "UpdateContainer",
		req:    &protocol.UpdateContainerRequest{ContainerId: "c", Resources: &protocol.LinuxResources{Pids: &protocol.LinuxPids{Limit: 7}}},
	},
	{
		name: "StatsContainer",
		call: func(ctx context.Context, c *Client) (any, error) {
			stats, err := c.StatsContainer(ctx, "c")
			return stats.GetCgroupStats().GetPidsStats().GetCurrent(), err
		},
		method: "StatsContainer", req: &protocol.StatsContainerRequest{ContainerId: "c"},
		answer: &protocol.StatsContainerResponse{CgroupStats: &protocol.CgroupStats{PidsStats: &protocol.PidsStats{Current: 3}}},
		want:   uint64(3),
	},
	{
		name: "PauseContainer", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.PauseContainer(ctx, "c")) },
		method: "PauseContainer", req: &protocol.PauseContainerRequest{ContainerId: "c"},
	},
	{
		name: "ResumeContainer", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.ResumeContainer(ctx, "c")) },
		method: "ResumeContainer", req: &protocol.ResumeContainerRequest{ContainerId: "c"},
	},
	{
		name: "OOMEvent", call: func(ctx context.Context, c *Client) (any, error) { return c.OOMEvent(ctx) },
		method: "GetOOMEvent", req: &protocol.GetOOMEventRequest{}, answer: &protocol.OOMEvent{ContainerId: "c"}, want: "c",
	},
	{
		name: "Pids",
		call: func(ctx context.Context, c *Client) (any, error) {
			pids, err := c.Pids(ctx, "c")
			if err != nil || len(pids) == 0 {
				return nil, err
			}
			return fmt.Sprintf("%d %d %s", len(pids), pids[0].GetPid(), pids[0].GetExecId()), nil
		},
		method: "Pids", req: &extension.PidsRequest{ContainerId: "c"},
		answer: &extension.PidsResponse{Processes: []*extension.ProcessInfo{{Pid: 12, ExecId: "e"}}},
		want:   "1 12 e",
	},
	{
		name: "DiagnosticData",
		call: func(ctx context.Context, c *Client) (any, error) {
			data, err := c.DiagnosticData(ctx, "termination_log", "c")
			return string(data), err
		},
		method: "GetDiagnosticData", req: &protocol.GetDiagnosticDataRequest{LogType: "termination_log", ContainerId: "c"},
		answer: &protocol.GetDiagnosticDataResponse{Data: []byte("died")}, want: "died",
	},
	{
		name: "Exec",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.Exec(ctx, &protocol.ExecProcessRequest{ContainerId: "c", ExecId: "e", Process: &protocol.Process{Args: []string{"ls"}}}))
		},
		method: "ExecProcess",
		req:    &protocol.ExecProcessRequest{ContainerId: "c", ExecId: "e", Process: &protocol.Process{Args: []string{"ls"}}},
	},
	{
		name: "SignalProcess",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.SignalProcess(ctx, "c", "e", 15, false))
		},
		method: "Signal", req: &extension.SignalRequest{ContainerId: "c", ExecId: "e", Signal: 15},
	},
	{
		name: "SignalProcess first",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.SignalProcess(ctx, "c", "", 9, false))
		},
		method: "Signal", req: &extension.SignalRequest{ContainerId: "c", ExecId: "c", Signal: 9},
	},
	{
		name: "SignalProcess all",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.SignalProcess(ctx, "c", "c", 9, true))
		},
		method: "Signal", req: &extension.SignalRequest{ContainerId: "c", Signal: 9, All: true},
	},
	{
		name: "WinsizeProcess",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.WinsizeProcess(ctx, "c", "", 24, 80))
		},
		method: "TtyWinResize", req: &protocol.TtyWinResizeRequest{ContainerId: "c", ExecId: "c", Row: 24, Column: 80},
	},
	{
		name: "WaitProcess",
		call: func(ctx context.Context, c *Client) (any, error) {
			exit, err := c.WaitProcess(ctx, "c", "e")
			exit.ExitedAt = exit.ExitedAt.UTC()
			return exit, err
		},
		method: "WaitProcess", req: &protocol.WaitProcessRequest{ContainerId: "c", ExecId: "e"},
		answer: &protocol.WaitProcessResponse{Status: 137, OomKilled: true, ExitedAt: 1_000_000_001},
		want:   ExitStatus{Code: 137, OOMKilled: true, ExitedAt: time.Unix(1, 1).UTC()},
	},
	{
		name: "WriteProcessStdin",
		call: func(ctx context.Context, c *Client) (any, error) {
			return c.WriteProcessStdin(ctx, "c", "e", []byte("abc"))
		},
		method: "WriteStdin", req: &protocol.WriteStreamRequest{ContainerId: "c", ExecId: "e", Data: []byte("abc")},
		answer: &protocol.WriteStreamResponse{Len: 3}, want: 3,
	},
	{
		name: "CloseProcessStdin", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.CloseProcessStdin(ctx, "c", "")) },
		method: "CloseStdin", req: &protocol.CloseStdinRequest{ContainerId: "c", ExecId: "c"},
	},
	{
		name: "ReadProcessStdout",
		call: func(ctx context.Context, c *Client) (any, error) {
			buf := make([]byte, 10)
			n, err := c.ReadProcessStdout(ctx, "c", "e", buf)
			return string(buf[:n]), err
		},
		method: "ReadStdout", req: &protocol.ReadStreamRequest{ContainerId: "c", ExecId: "e", Len: pieceSize},
		answer: &protocol.ReadStreamResponse{Data: []byte("out")}, want: "out",
	},
	{
		name: "ReadProcessStderr",
		call: func(ctx context.Context, c *Client) (any, error) {
			buf := make([]byte, 10)
			n, err := c.ReadProcessStderr(ctx, "c", "", buf)
			return string(buf[:n]), err
		},
		method: "ReadStderr", req: &protocol.ReadStreamRequest{ContainerId: "c", ExecId: "c", Len: pieceSize},
		answer: &protocol.ReadStreamResponse{Data: []byte("err")}, want: "err",
	},
	{
		name: "OnlineCPUMem", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.OnlineCPUMem(ctx, 2, true)) },
		method: "OnlineCPUMem", req: &protocol.OnlineCPUMemRequest{Wait: true, NbCpus: 2, CpuOnly: true},
	},
	{
		name: "MemHotplugByProbe",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.MemHotplugByProbe(ctx, []uint64{1 << 32, 2 << 32}))
		},
		method: "MemHotplugByProbe", req: &protocol.MemHotplugByProbeRequest{MemHotplugProbeAddr: []uint64{1 << 32, 2 << 32}},
	},
	{
		name: "AddSwap", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.AddSwap(ctx, []uint32{2, 5})) },
		method: "AddSwap", req: &protocol.AddSwapRequest{PCIPath: []uint32{2, 5}},
	},
	{
		name: "AddSwapPath", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.AddSwapPath(ctx, "/dev/vdb")) },
		method: "AddSwapPath", req: &protocol.AddSwapPathRequest{Path: "/dev/vdb"},
	},
	{
		name: "UpdateInterface",
		call: func(ctx context.Context, c *Client) (any, error) {
			i, err := c.UpdateInterface(ctx, &types.Interface{HwAddr: "02:00:00:00:00:01", Mtu: 1400})
			return i.GetName(), err
		},
		method: "UpdateInterface",
		req:    &protocol.UpdateInterfaceRequest{Interface: &types.Interface{HwAddr: "02:00:00:00:00:01", Mtu: 1400}},
		answer: &types.Interface{Name: "eth0"}, want: "eth0",
	},
	{
		name: "ListInterfaces",
		call: func(ctx context.Context, c *Client) (any, error) {
			all, err := c.ListInterfaces(ctx)
			return len(all), err
		},
		method: "ListInterfaces", req: &protocol.ListInterfacesRequest{},
		answer: &protocol.Interfaces{Interfaces: []*types.Interface{{Name: "lo"}, {Name: "eth0"}}}, want: 2,
	},
	{
		name: "UpdateRoutes",
		call: func(ctx context.Context, c *Client) (any, error) {
			all, err := c.UpdateRoutes(ctx, []*types.Route{{Dest: "10.0.0.0/8"}})
			return len(all), err
		},
		method: "UpdateRoutes",
		req:    &protocol.UpdateRoutesRequest{Routes: &protocol.Routes{Routes: []*types.Route{{Dest: "10.0.0.0/8"}}}},
		answer: &protocol.Routes{Routes: []*types.Route{{Dest: "10.0.0.0/8"}, {Gateway: "10.0.0.1"}}}, want: 2,
	},
	{
		name: "ListRoutes",
		call: func(ctx context.Context, c *Client) (any, error) {
			all, err := c.ListRoutes(ctx)
			return len(all), err
		},
		method: "ListRoutes", req: &protocol.ListRoutesRequest{},
		answer: &protocol.Routes{Routes: []*types.Route{{}}}, want: 1,
	},
	{
		name: "AddARPNeighbors",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.AddARPNeighbors(ctx, []*types.ARPNeighbor{{Device: "eth0", State: 128}}))
		},
		method: "AddARPNeighbors",
		req:    &protocol.AddARPNeighborsRequest{Neighbors: &protocol.ARPNeighbors{ARPNeighbors: []*types.ARPNeighbor{{Device: "eth0", State: 128}}}},
	},
	{
		name: "IPTables",
		call: func(ctx context.Context, c *Client) (any, error) {
			data, err := c.IPTables(ctx, true)
			return string(data), err
		},
		method: "GetIPTables", req: &protocol.GetIPTablesRequest{IsIpv6: true},
		answer: &protocol.GetIPTablesResponse{Data: []byte("*filter")}, want: "*filter",
	},
	{
		name: "SetIPTables", call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.SetIPTables(ctx, false, []byte("*nat")))
		},
		method: "SetIPTables", req: &protocol.SetIPTablesRequest{Data: []byte("*nat")}, answer: &protocol.SetIPTablesResponse{},
	},
	{
		name: "GuestDetails",
		call: func(ctx context.Context, c *Client) (any, error) {
			details, err := c.GuestDetails(ctx)
			return details.GetMemBlockSizeBytes(), err
		},
		method: "GetGuestDetails", req: &protocol.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true},
		answer: &protocol.GuestDetailsResponse{MemBlockSizeBytes: 1 << 27}, want: uint64(1 << 27),
	},
	{
		name: "SetGuestDateTime",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.SetGuestDateTime(ctx, time.Unix(1_700_000_000, 123_456_789)))
		},
		method: "SetGuestDateTime", req: &protocol.SetGuestDateTimeRequest{Sec: 1_700_000_000, Usec: 123_456},
	},
	{
		name: "ReseedRNG", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.ReseedRNG(ctx, []byte{1, 2})) },
		method: "ReseedRandomDev", req: &protocol.ReseedRandomDevRequest{Data: []byte{1, 2}},
	},
	{
		name: "Metrics", call: func(ctx context.Context, c *Client) (any, error) { return c.Metrics(ctx) },
		method: "GetMetrics", req: &protocol.GetMetricsRequest{}, answer: &protocol.Metrics{Metrics: "up 1"}, want: "up 1",
	},
	{
		name: "SetPolicy", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.SetPolicy(ctx, "package p")) },
		method: "SetPolicy", req: &protocol.SetPolicyRequest{Policy: "package p"},
	},
	{
		name: "MemAgentMemcgSet",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.MemAgentMemcgSet(ctx, &protocol.MemAgentMemcgConfig{Disabled: new(true)}))
		},
		method: "MemAgentMemcgSet", req: &protocol.MemAgentMemcgConfig{Disabled: new(true)},
	},
	{
		name: "MemAgentCompactSet",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.MemAgentCompactSet(ctx, &protocol.MemAgentCompactConfig{CompactSecMax: new(int64(3))}))
		},
		method: "MemAgentCompactSet", req: &protocol.MemAgentCompactConfig{CompactSecMax: new(int64(3))},
	},
	{
		name: "GuestVolumeStats",
		call: func(ctx context.Context, c *Client) (any, error) {
			stats, err := c.GuestVolumeStats(ctx, "/mnt")
			if err != nil || len(stats.GetUsage()) == 0 {
				return nil, err
			}
			return stats.GetUsage()[0].GetTotal(), nil
		},
		method: "GetVolumeStats", req: &protocol.VolumeStatsRequest{VolumeGuestPath: "/mnt"},
		answer: &protocol.VolumeStatsResponse{Usage: []*protocol.VolumeUsage{{Total: 5}}}, want: uint64(5),
	},
	{
		name: "ResizeGuestVolume", call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.ResizeGuestVolume(ctx, "/mnt", 1<<30))
		},
		method: "ResizeVolume", req: &protocol.ResizeVolumeRequest{VolumeGuestPath: "/mnt", Size: 1 << 30},
	},
	{
		name: "RemoveStaleShareMounts", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.RemoveStaleShareMounts(ctx)) },
		method: "RemoveStaleVirtiofsShareMounts", req: &protocol.RemoveStaleVirtiofsShareMountsRequest{},
	},
	{
		name: "UpdateEphemeralMounts",
		call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.UpdateEphemeralMounts(ctx, []*protocol.Storage{{Driver: "ephemeral"}}))
		},
		method: "UpdateEphemeralMounts", req: &protocol.UpdateEphemeralMountsRequest{Storages: []*protocol.Storage{{Driver: "ephemeral"}}},
	},
}

// answering makes a peer answer an operation's method, or fail it.
func answering(p *agenttest.Peer, op operation, fail error) {
	p.Handle(op.method, func(context.Context, proto.Message) (proto.Message, error) {
		if op.answer == nil {
			return empty, fail
		}
		return op.answer, fail
	})
}

// Every operation sends its request, whole, and hands back what is answered.
func TestOperations(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			peer := agenttest.Start(t, agenttest.Options{})
			answering(peer, op, nil)
			got, err := op.call(within(t, 10*time.Second), newClient(t, peer))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(op.want, got); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
			calls := peer.Calls(op.method)
			if len(calls) != 1 {
				t.Fatalf("got %d calls of %s, want 1", len(calls), op.method)
			}
			if diff := cmp.Diff(op.req, calls[0].Request, protocmp.Transform()); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
		})
	}
}

// An error of the guest has its class in every operation, and its name.
func TestOperationErrors(t *testing.T) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			peer := agenttest.Start(t, agenttest.Options{})
			answering(peer, op, fmt.Errorf("because: %w", errdefs.ErrPermissionDenied))
			_, err := op.call(within(t, 10*time.Second), newClient(t, peer))
			wantClass(t, err, errdefs.ErrPermissionDenied)
			if want := "agent: " + op.method + `: guest: "because: permission denied"`; err.Error() != want {
				t.Errorf("got error %q, want %q", err, want)
			}
		})
	}
}

// Every method of the three services is reached by an operation, or is one of
// those that StartSandbox and CopyFile send.
func TestEveryMethodIsReached(t *testing.T) {
	reached := []string{"CreateSandbox", "CopyFile", "SignalProcess"}
	for _, op := range operations {
		reached = append(reached, op.method)
	}
	for _, file := range []string{"agent", "health", "extension"} {
		for _, m := range methods(t, file) {
			if !slices.Contains(reached, m) {
				t.Errorf("method %s of %s.proto: no operation sends it", m, file)
			}
		}
	}
}

func TestStartSandbox(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	peer.Handle("UpdateInterface", func(_ context.Context, req proto.Message) (proto.Message, error) {
		return req.(*protocol.UpdateInterfaceRequest).GetInterface(), nil
	})
	peer.Handle("UpdateRoutes", func(_ context.Context, req proto.Message) (proto.Message, error) {
		return req.(*protocol.UpdateRoutesRequest).GetRoutes(), nil
	})
	create := &protocol.CreateSandboxRequest{Hostname: "pod", Dns: []string{"nameserver 10.0.0.1"}, KernelModules: []*protocol.KernelModule{{Name: "loop"}}}
	c := newClient(t, peer)
	err := c.StartSandbox(within(t, 10*time.Second), Sandbox{
		Request:    create,
		Policy:     "package p",
		Interfaces: []*types.Interface{{Name: "eth0"}, {Name: "eth1"}},
		Routes:     []*types.Route{{Dest: "10.0.0.0/8"}},
		Neighbors:  []*types.ARPNeighbor{{Device: "eth0"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, call := range peer.Calls() {
		got = append(got, call.Method)
	}
	want := []string{"Check", "SetPolicy", "UpdateInterface", "UpdateInterface", "UpdateRoutes", "AddARPNeighbors", "CreateSandbox"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(create, peer.Calls("CreateSandbox")[0].Request, protocmp.Transform()); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}

	if err := c.StartSandbox(within(t, 10*time.Second), Sandbox{Request: create}); err != nil {
		t.Fatal(err)
	}
	if got := len(peer.Calls()) - len(want); got != 2 {
		t.Errorf("got %d calls for a sandbox without policy and network, want Check and CreateSandbox", got)
	}
}

func TestStartSandboxStopsAtTheFirstError(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	peer.Handle("UpdateInterface", func(context.Context, proto.Message) (proto.Message, error) {
		return nil, errdefs.ErrInvalidArgument
	})
	err := newClient(t, peer).StartSandbox(within(t, 10*time.Second), Sandbox{
		Request: &protocol.CreateSandboxRequest{}, Interfaces: []*types.Interface{{Name: "eth0"}},
	})
	wantClass(t, err, errdefs.ErrInvalidArgument)
	if n := len(peer.Calls("CreateSandbox")); n != 0 {
		t.Errorf("got %d sandboxes", n)
	}
}

// A peer without our extension gets what its protocol has.
func TestPlainPeer(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{Plain: true})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)

	ours, err := newClient(t, agenttest.Start(t, agenttest.Options{})).Capabilities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	caps, err := c.Capabilities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if caps.Extension || caps.ByteStreams || !ours.Extension || !ours.ByteStreams {
		t.Errorf("got capabilities %+v of a plain peer, %+v of ours", caps, ours)
	}

	_, err = c.Pids(ctx, "c")
	wantClass(t, err, errdefs.ErrNotImplemented)

	if err := c.CreateContainer(ctx, &protocol.CreateContainerRequest{ContainerId: "c", ExecId: "c"}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		execID string
		all    bool
		want   *protocol.SignalProcessRequest
	}{
		{"", false, &protocol.SignalProcessRequest{ContainerId: "c", ExecId: "c", Signal: 10}},
		{"c", true, &protocol.SignalProcessRequest{ContainerId: "c", ExecId: "", Signal: 10}},
	} {
		if err := c.SignalProcess(ctx, "c", tt.execID, 10, tt.all); err != nil {
			t.Error(err)
		}
		calls := peer.Calls("SignalProcess")
		if diff := cmp.Diff(tt.want, calls[len(calls)-1].Request, protocmp.Transform()); diff != "" {
			t.Errorf("request (-want +got):\n%s", diff)
		}
	}
	if n := len(peer.Calls("GetGuestDetails")); n != 1 {
		t.Errorf("got %d questions for capabilities, want 1", n)
	}
}

func TestNotServing(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	peer.Handle("Check", func(context.Context, proto.Message) (proto.Message, error) {
		return &protocol.HealthCheckResponse{Status: protocol.HealthCheckResponse_NOT_SERVING}, nil
	})
	wantUnavailable(t, newClient(t, peer).Check(within(t, 10*time.Second)), "not_serving")
}

// Removing what is gone succeeds; another refusal does not.
func TestStopContainerIsIdempotent(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)
	if err := c.StopContainer(ctx, "never there"); err != nil {
		t.Error(err)
	}
	peer.Handle("RemoveContainer", func(context.Context, proto.Message) (proto.Message, error) {
		return nil, errdefs.ErrFailedPrecondition
	})
	wantClass(t, c.StopContainer(ctx, "c"), errdefs.ErrFailedPrecondition)
}

// A guest that powers off may do so before its answer is out.
func TestStopSandboxOfAGuestThatIsGone(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	peer.Handle("DestroySandbox", func(ctx context.Context, _ proto.Message) (proto.Message, error) {
		peer.Drop(extension.AgentPort)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if err := newClient(t, peer).StopSandbox(within(t, 10*time.Second)); err != nil {
		t.Error(err)
	}
}

// An event that comes after its caller has left is not lost.
func TestOOMEventIsKept(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	_, err := c.OOMEvent(within(t, 50*time.Millisecond))
	wantClass(t, err, context.DeadlineExceeded)
	peer.OOM("c")
	id, err := c.OOMEvent(within(t, 10*time.Second))
	if id != "c" || err != nil {
		t.Errorf("got %q, %v", id, err)
	}
	if n := len(peer.Calls("GetOOMEvent")); n != 1 {
		t.Errorf("got %d polls, want 1", n)
	}
}

// A write counts what the guest took; no data is not the end of input.
func TestWriteProcessStdin(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)
	if n, err := c.WriteProcessStdin(ctx, "c", "", nil); n != 0 || err != nil {
		t.Errorf("got %d, %v for no data", n, err)
	}
	for _, tt := range []struct {
		name  string
		took  []uint32
		want  int
		class error
	}{
		{"in two parts", []uint32{2, 4}, 6, nil},
		{"nothing", []uint32{0}, 0, io.ErrShortWrite},
		{"too much", []uint32{7}, 0, errdefs.ErrUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			took := tt.took
			peer.Handle("WriteStdin", func(context.Context, proto.Message) (proto.Message, error) {
				n := took[0]
				took = took[1:]
				return &protocol.WriteStreamResponse{Len: n}, nil
			})
			n, err := c.WriteProcessStdin(ctx, "c", "", []byte("abcdef"))
			if n != tt.want {
				t.Errorf("got %d bytes, want %d", n, tt.want)
			}
			if tt.class != nil || err != nil {
				wantClass(t, err, tt.class)
			}
		})
	}
}
