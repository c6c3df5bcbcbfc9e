// Package agent is the guest as the host sees it: the operations that the
// project exists to provide, and the client that carries them over ttrpc.
//
// Operations take ids and protocol messages and return values; they know
// nothing of sandboxes. Every context bounds its call. Errors carry a class of
// github.com/containerd/errdefs: ErrNotFound, ErrInvalidArgument,
// ErrFailedPrecondition, ErrPermissionDenied, ErrUnavailable (the guest is
// gone or the connection is), ErrDeadlineExceeded (context.DeadlineExceeded),
// ErrNotImplemented (the peer does not know the operation).
package agent

import (
	"context"
	"io"
	"time"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// Agent is every operation. Callers take the smallest part that serves them.
type Agent interface {
	Lifecycle
	Containers
	Processes
	Resources
	Network
	Guest
	Volumes
	State
}

// Lifecycle is the connection and the sandbox.
type Lifecycle interface {
	// Init takes the agent's settings. keepVM says that the host must not shut
	// the machine down at stop: the guest still has something to flush.
	Init(ctx context.Context, settings Settings) (keepVM bool, err error)
	// Configure changes the settings for a machine that is yet to start.
	Configure(ctx context.Context, settings Settings) error
	// ConfigureFromRPC changes the settings of a machine that already runs.
	ConfigureFromRPC(ctx context.Context, settings Settings) error
	// Capabilities asks the guest what its agent supports.
	Capabilities(ctx context.Context) (Capabilities, error)
	// Check says whether the agent serves.
	Check(ctx context.Context) error
	// LongLiveConn says whether one connection is kept, or made for each call.
	LongLiveConn() bool
	// Disconnect closes the connection; calls in flight fail at once. Idempotent.
	Disconnect() error
	// AgentURL names the agent for another client: vsock://CID:PORT or hvsock://PATH:PORT.
	AgentURL() (string, error)
	// SetAgentURL says where the agent is.
	SetAgentURL(url string) error
	// ReuseAgent takes over the connection and the state of another client,
	// which is left disconnected.
	ReuseAgent(from *Client) error
	// CreateSandbox prepares on the host what the sandbox needs, before the machine starts.
	CreateSandbox(ctx context.Context) error
	// StartSandbox checks the agent, sets policy, interfaces, routes and
	// neighbours, and creates the sandbox in the guest.
	StartSandbox(ctx context.Context, sandbox Sandbox) error
	// StopSandbox ends all containers; the guest powers off.
	StopSandbox(ctx context.Context) error
	// MarkDead makes every later call fail at once: the guest is gone.
	MarkDead(cause error)
	// Cleanup removes what the agent left on the host.
	Cleanup(ctx context.Context) error
}

// Containers is the life of containers.
type Containers interface {
	CreateContainer(ctx context.Context, req *protocol.CreateContainerRequest) error
	StartContainer(ctx context.Context, containerID string) error
	// StopContainer removes the container; its storages are unmounted. Removing
	// what is gone succeeds.
	StopContainer(ctx context.Context, containerID string) error
	UpdateContainer(ctx context.Context, containerID string, resources *protocol.LinuxResources) error
	StatsContainer(ctx context.Context, containerID string) (*protocol.StatsContainerResponse, error)
	PauseContainer(ctx context.Context, containerID string) error
	ResumeContainer(ctx context.Context, containerID string) error
	// OOMEvent waits for the next OOM kill and names its container. One caller at a time.
	OOMEvent(ctx context.Context) (containerID string, err error)
	// Pids lists the container's processes; ErrNotImplemented by a plain peer.
	Pids(ctx context.Context, containerID string) ([]*extension.ProcessInfo, error)
	// DiagnosticData returns a file that the guest keeps about a container ("termination_log").
	DiagnosticData(ctx context.Context, logType, containerID string) ([]byte, error)
}

// Processes is what can be done to one process. The first process of a
// container has the container's id as its exec id.
type Processes interface {
	// Exec starts a process in a running container.
	Exec(ctx context.Context, req *protocol.ExecProcessRequest) error
	// SignalProcess delivers a signal; all means every process of the container.
	SignalProcess(ctx context.Context, containerID, execID string, signal uint32, all bool) error
	// WaitProcess waits for the end of a process. Any number of callers, early
	// or late: the status is kept until StopContainer, or ForgetProcess.
	WaitProcess(ctx context.Context, containerID, execID string) (ExitStatus, error)
	// ForgetProcess drops what is kept of an ended process.
	ForgetProcess(containerID, execID string)
	WinsizeProcess(ctx context.Context, containerID, execID string, rows, columns uint32) error
	// Streams opens the standard streams of a process that was created and not
	// yet waited for: by byte streams when the peer has them, otherwise by RPCs.
	Streams(ctx context.Context, containerID, execID string, want StreamSet) (*Streams, error)
	// The four plain operations beneath Streams. A read returns io.EOF at the end.
	WriteProcessStdin(ctx context.Context, containerID, execID string, data []byte) (int, error)
	CloseProcessStdin(ctx context.Context, containerID, execID string) error
	ReadProcessStdout(ctx context.Context, containerID, execID string, buf []byte) (int, error)
	ReadProcessStderr(ctx context.Context, containerID, execID string, buf []byte) (int, error)
}

// Resources is what was hot-plugged.
type Resources interface {
	OnlineCPUMem(ctx context.Context, cpus uint32, cpuOnly bool) error
	MemHotplugByProbe(ctx context.Context, addrs []uint64) error
	AddSwap(ctx context.Context, pciPath []uint32) error
	AddSwapPath(ctx context.Context, path string) error
}

// Network is the guest's network configuration.
type Network interface {
	UpdateInterface(ctx context.Context, iface *types.Interface) (*types.Interface, error)
	ListInterfaces(ctx context.Context) ([]*types.Interface, error)
	UpdateRoutes(ctx context.Context, routes []*types.Route) ([]*types.Route, error)
	ListRoutes(ctx context.Context) ([]*types.Route, error)
	AddARPNeighbors(ctx context.Context, neighbors []*types.ARPNeighbor) error
	IPTables(ctx context.Context, ipv6 bool) ([]byte, error)
	SetIPTables(ctx context.Context, ipv6 bool, data []byte) error
}

// Guest is the guest as a whole.
type Guest interface {
	GuestDetails(ctx context.Context) (*protocol.GuestDetailsResponse, error)
	SetGuestDateTime(ctx context.Context, now time.Time) error
	ReseedRNG(ctx context.Context, data []byte) error
	// CopyFile copies a file, directory or link of the host into the guest.
	CopyFile(ctx context.Context, src, dst string) error
	// Metrics returns Prometheus text.
	Metrics(ctx context.Context) (string, error)
	SetPolicy(ctx context.Context, policy string) error
	// Version asks for the agent's API version and its own.
	Version(ctx context.Context) (api, agent string, err error)
	MemAgentMemcgSet(ctx context.Context, cfg *protocol.MemAgentMemcgConfig) error
	MemAgentCompactSet(ctx context.Context, cfg *protocol.MemAgentCompactConfig) error
}

// Volumes is file systems in the guest.
type Volumes interface {
	GuestVolumeStats(ctx context.Context, path string) (*protocol.VolumeStatsResponse, error)
	ResizeGuestVolume(ctx context.Context, path string, size uint64) error
	RemoveStaleShareMounts(ctx context.Context) error
	UpdateEphemeralMounts(ctx context.Context, storages []*protocol.Storage) error
}

// State is what must survive the client.
type State interface {
	Save() (SavedState, error)
	Load(state SavedState) error
}

// Settings are the agent's, from the configuration.
type Settings struct {
	// Dial reaches the guest.
	Dial vsock.Dialer
	// URL is what AgentURL answers.
	URL string
	// DialPerCall makes a connection for each call instead of keeping one.
	DialPerCall bool
	// RequestTimeout bounds calls whose context has no deadline, except those
	// that wait for an event. Zero: 60 s.
	RequestTimeout time.Duration
	// WriteTimeout bounds each write to the connection: a guest that stopped
	// reading must not block callers. Zero: 10 s.
	WriteTimeout time.Duration
	// Tracing: the guest flushes traces when it stops, so the host waits for it.
	Tracing bool
}

// Capabilities are what a peer supports.
type Capabilities struct {
	Version      string // the agent's own
	Extension    bool   // the Extension service is there
	ByteStreams  bool   // a connection per stream is there
	Connect      bool   // connections into the containers' network are there
	Seccomp      bool
	BlockDevices bool
	SharedFS     bool
	MultiQueue   bool
	Storages     []string // handlers as announced
	Devices      []string
}

// A Sandbox is what StartSandbox tells the guest.
type Sandbox struct {
	Request    *protocol.CreateSandboxRequest
	Policy     string
	Interfaces []*types.Interface
	Routes     []*types.Route
	Neighbors  []*types.ARPNeighbor
}

// An ExitStatus is how a process ended.
type ExitStatus struct {
	Code      int32     // exit code, or 128 plus the signal
	ExitedAt  time.Time // by the host's clock when the peer does not say
	OOMKilled bool      // the guest's kernel killed a process of the container before
}

// StreamSet says which streams of a process are wanted.
type StreamSet struct{ Stdin, Stdout, Stderr bool }

// Streams are the standard streams of one process; those not asked for are nil.
type Streams struct {
	// Stdin: Close is the end of input, in order behind what was written.
	Stdin io.WriteCloser
	// Stdout and Stderr end with io.EOF only when everything the process and
	// its children wrote was delivered; a cut is io.ErrUnexpectedEOF.
	Stdout, Stderr io.ReadCloser

	cut []func() // what ends each of them
}

// Close cuts the streams: what is blocked on them returns. Output that was not
// read is lost, and input that was not taken may be.
func (s *Streams) Close() error {
	for _, cut := range s.cut {
		cut()
	}
	return nil
}

// SavedState finds the agent again.
type SavedState struct {
	URL string `json:"url"`
}
