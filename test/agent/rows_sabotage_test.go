package agent_test

import (
	"context"
	"io"
	"time"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
)

// Each type is an agent whose one operation succeeds without effect: what it
// answers is empty, or what a caller would believe.
type (
	noInit                   struct{ agent.Agent }
	noConfigure              struct{ agent.Agent }
	noConfigureFromRPC       struct{ agent.Agent }
	noCapabilities           struct{ agent.Agent }
	noCheck                  struct{ agent.Agent }
	noLongLiveConn           struct{ agent.Agent }
	noDisconnect             struct{ agent.Agent }
	noAgentURL               struct{ agent.Agent }
	noSetAgentURL            struct{ agent.Agent }
	noReuseAgent             struct{ agent.Agent }
	noCreateSandbox          struct{ agent.Agent }
	noStartSandbox           struct{ agent.Agent }
	noStopSandbox            struct{ agent.Agent }
	noMarkDead               struct{ agent.Agent }
	noCleanup                struct{ agent.Agent }
	noCreateContainer        struct{ agent.Agent }
	noStartContainer         struct{ agent.Agent }
	noStopContainer          struct{ agent.Agent }
	noUpdateContainer        struct{ agent.Agent }
	noStatsContainer         struct{ agent.Agent }
	noPauseContainer         struct{ agent.Agent }
	noResumeContainer        struct{ agent.Agent }
	noOOMEvent               struct{ agent.Agent }
	noPids                   struct{ agent.Agent }
	noDiagnosticData         struct{ agent.Agent }
	noExec                   struct{ agent.Agent }
	noSignalProcess          struct{ agent.Agent }
	noWaitProcess            struct{ agent.Agent }
	noForgetProcess          struct{ agent.Agent }
	noWinsizeProcess         struct{ agent.Agent }
	noStreams                struct{ agent.Agent }
	noWriteProcessStdin      struct{ agent.Agent }
	noCloseProcessStdin      struct{ agent.Agent }
	noReadProcessStdout      struct{ agent.Agent }
	noReadProcessStderr      struct{ agent.Agent }
	noOnlineCPUMem           struct{ agent.Agent }
	noMemHotplugByProbe      struct{ agent.Agent }
	noAddSwap                struct{ agent.Agent }
	noAddSwapPath            struct{ agent.Agent }
	noUpdateInterface        struct{ agent.Agent }
	noListInterfaces         struct{ agent.Agent }
	noUpdateRoutes           struct{ agent.Agent }
	noListRoutes             struct{ agent.Agent }
	noAddARPNeighbors        struct{ agent.Agent }
	noIPTables               struct{ agent.Agent }
	noSetIPTables            struct{ agent.Agent }
	noGuestDetails           struct{ agent.Agent }
	noSetGuestDateTime       struct{ agent.Agent }
	noReseedRNG              struct{ agent.Agent }
	noCopyFile               struct{ agent.Agent }
	noMetrics                struct{ agent.Agent }
	noSetPolicy              struct{ agent.Agent }
	noVersion                struct{ agent.Agent }
	noMemAgentMemcgSet       struct{ agent.Agent }
	noMemAgentCompactSet     struct{ agent.Agent }
	noGuestVolumeStats       struct{ agent.Agent }
	noResizeGuestVolume      struct{ agent.Agent }
	noRemoveStaleShareMounts struct{ agent.Agent }
	noUpdateEphemeralMounts  struct{ agent.Agent }
	noSave                   struct{ agent.Agent }
	noLoad                   struct{ agent.Agent }
)

// with makes one of them.
func with[T ~struct{ agent.Agent }](a agent.Agent) agent.Agent {
	return any(T{a}).(agent.Agent)
}

func (noInit) Init(context.Context, agent.Settings) (bool, error) { return false, nil }

func (noConfigure) Configure(context.Context, agent.Settings) error { return nil }

func (noConfigureFromRPC) ConfigureFromRPC(context.Context, agent.Settings) error { return nil }

func (noCapabilities) Capabilities(context.Context) (agent.Capabilities, error) {
	return agent.Capabilities{}, nil
}

func (noCheck) Check(context.Context) error { return nil }

func (noLongLiveConn) LongLiveConn() bool { return false }

func (noDisconnect) Disconnect() error { return nil }

func (noAgentURL) AgentURL() (string, error) { return "", nil }

func (noSetAgentURL) SetAgentURL(string) error { return nil }

func (noReuseAgent) ReuseAgent(*agent.Client) error { return nil }

func (noCreateSandbox) CreateSandbox(context.Context) error { return nil }

func (noStartSandbox) StartSandbox(context.Context, agent.Sandbox) error { return nil }

func (noStopSandbox) StopSandbox(context.Context) error { return nil }

func (noMarkDead) MarkDead(error) {}

func (noCleanup) Cleanup(context.Context) error { return nil }

func (noCreateContainer) CreateContainer(context.Context, *protocol.CreateContainerRequest) error {
	return nil
}

func (noStartContainer) StartContainer(context.Context, string) error { return nil }

func (noStopContainer) StopContainer(context.Context, string) error { return nil }

func (noUpdateContainer) UpdateContainer(context.Context, string, *protocol.LinuxResources) error {
	return nil
}

func (noStatsContainer) StatsContainer(context.Context, string) (*protocol.StatsContainerResponse, error) {
	return &protocol.StatsContainerResponse{}, nil
}

func (noPauseContainer) PauseContainer(context.Context, string) error { return nil }

func (noResumeContainer) ResumeContainer(context.Context, string) error { return nil }

func (noOOMEvent) OOMEvent(context.Context) (string, error) { return "", nil }

func (noPids) Pids(context.Context, string) ([]*extension.ProcessInfo, error) { return nil, nil }

func (noDiagnosticData) DiagnosticData(context.Context, string, string) ([]byte, error) {
	return nil, nil
}

func (noExec) Exec(context.Context, *protocol.ExecProcessRequest) error { return nil }

func (noSignalProcess) SignalProcess(context.Context, string, string, uint32, bool) error { return nil }

func (noWaitProcess) WaitProcess(context.Context, string, string) (agent.ExitStatus, error) {
	return agent.ExitStatus{}, nil
}

func (noForgetProcess) ForgetProcess(string, string) {}

func (noWinsizeProcess) WinsizeProcess(context.Context, string, string, uint32, uint32) error {
	return nil
}

func (noStreams) Streams(context.Context, string, string, agent.StreamSet) (*agent.Streams, error) {
	return &agent.Streams{}, nil
}

func (noWriteProcessStdin) WriteProcessStdin(_ context.Context, _, _ string, data []byte) (int, error) {
	return len(data), nil
}

func (noCloseProcessStdin) CloseProcessStdin(context.Context, string, string) error { return nil }

func (noReadProcessStdout) ReadProcessStdout(context.Context, string, string, []byte) (int, error) {
	return 0, io.EOF
}

func (noReadProcessStderr) ReadProcessStderr(context.Context, string, string, []byte) (int, error) {
	return 0, io.EOF
}

func (noOnlineCPUMem) OnlineCPUMem(context.Context, uint32, bool) error { return nil }

func (noMemHotplugByProbe) MemHotplugByProbe(context.Context, []uint64) error { return nil }

func (noAddSwap) AddSwap(context.Context, []uint32) error { return nil }

func (noAddSwapPath) AddSwapPath(context.Context, string) error { return nil }

func (noUpdateInterface) UpdateInterface(_ context.Context, i *types.Interface) (*types.Interface, error) {
	return i, nil
}

func (noListInterfaces) ListInterfaces(context.Context) ([]*types.Interface, error) { return nil, nil }

func (noUpdateRoutes) UpdateRoutes(_ context.Context, r []*types.Route) ([]*types.Route, error) {
	return r, nil
}

func (noListRoutes) ListRoutes(context.Context) ([]*types.Route, error) { return nil, nil }

func (noAddARPNeighbors) AddARPNeighbors(context.Context, []*types.ARPNeighbor) error { return nil }

func (noIPTables) IPTables(context.Context, bool) ([]byte, error) { return nil, nil }

func (noSetIPTables) SetIPTables(context.Context, bool, []byte) error { return nil }

func (noGuestDetails) GuestDetails(context.Context) (*protocol.GuestDetailsResponse, error) {
	return &protocol.GuestDetailsResponse{}, nil
}

func (noSetGuestDateTime) SetGuestDateTime(context.Context, time.Time) error { return nil }

func (noReseedRNG) ReseedRNG(context.Context, []byte) error { return nil }

func (noCopyFile) CopyFile(context.Context, string, string) error { return nil }

func (noMetrics) Metrics(context.Context) (string, error) { return "", nil }

func (noSetPolicy) SetPolicy(context.Context, string) error { return nil }

func (noVersion) Version(context.Context) (string, string, error) { return "", "", nil }

func (noMemAgentMemcgSet) MemAgentMemcgSet(context.Context, *protocol.MemAgentMemcgConfig) error {
	return nil
}

func (noMemAgentCompactSet) MemAgentCompactSet(context.Context, *protocol.MemAgentCompactConfig) error {
	return nil
}

func (noGuestVolumeStats) GuestVolumeStats(context.Context, string) (*protocol.VolumeStatsResponse, error) {
	return &protocol.VolumeStatsResponse{}, nil
}

func (noResizeGuestVolume) ResizeGuestVolume(context.Context, string, uint64) error { return nil }

func (noRemoveStaleShareMounts) RemoveStaleShareMounts(context.Context) error { return nil }

func (noUpdateEphemeralMounts) UpdateEphemeralMounts(context.Context, []*protocol.Storage) error {
	return nil
}

func (noSave) Save() (agent.SavedState, error) { return agent.SavedState{}, nil }

func (noLoad) Load(agent.SavedState) error { return nil }
