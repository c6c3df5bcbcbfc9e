// Package sandbox is the state machine of a virtual machine and the containers
// in it: the order of start, and of undoing it. It turns a host's OCI
// specification into the guest's, keeps one versioned state file that a later
// process can clean up from, and runs the hooks that belong on the host. It
// speaks neither containerd's types nor QEMU's.
package sandbox

import (
	"context"
	"io"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/storage"
)

// Machine is what a sandbox needs of a running machine; *qemu.VM satisfies it.
type Machine interface {
	Ready() <-chan struct{}
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	AgentURL(port uint32) string
	Done() <-chan struct{}
	Err() error
	Shutdown(ctx context.Context) error
	Kill() error
	Console() string
	Processes() []hypervisor.Process
}

// VMOptions is what a sandbox asks of the function that starts its machine.
type VMOptions struct {
	Dir      string   // the sandbox's directory
	Env      []string // for every process started
	Started  func(hypervisor.Process) error
	CgroupFD int
}

// Config is the operator's choice for every sandbox.
type Config struct {
	// Machine is the base: names, ids, shares and the sizes that containers ask
	// for are added to it.
	Machine hypervisor.Spec
	// StartTimeout bounds the time from the machine's start to the agent's first answer.
	StartTimeout time.Duration
	// StopTimeout bounds a graceful stop, before the machine is killed.
	StopTimeout time.Duration
	// RequestTimeout bounds a call to the agent.
	RequestTimeout time.Duration
	// HookTimeout bounds a hook that has no timeout of its own.
	HookTimeout time.Duration
}

// Options make a Sandbox.
type Options struct {
	ID        string
	Namespace string // containerd's
	Address   string // of the daemon
	Dir       string // made by Start, removed by Stop; see Dir
	Config    Config
	StartVM   func(ctx context.Context, spec hypervisor.Spec, opts VMOptions) (Machine, error)
	// OnOOM is called when the guest's kernel killed a process of a container,
	// always before the Done of a process that this ended. It must not block.
	OnOOM func(containerID string)
}

// A Sandbox is one machine and its containers.
type Sandbox struct{}

// New allocates; nothing runs yet.
func New(opts Options) (*Sandbox, error) { return nil, errdefs.ErrNotImplemented }

// Dir is where a sandbox keeps its state: root/<16 hex digits>, derived from
// the daemon's address, the namespace and the id.
func Dir(root, address, namespace, id string) string { return "" }

// Start boots the machine for a sandbox whose first container has the given
// spec (annotations, netns, cgroup path, sizes are taken from it), and creates
// the sandbox in the guest. On error or cancel nothing is left.
func (s *Sandbox) Start(ctx context.Context, spec *specs.Spec) error {
	return errdefs.ErrNotImplemented
}

// CreateContainer makes a container, its task process on the host and its
// streams. It may be called while Start runs: host work goes on beside the
// boot. On error or cancel nothing of the container is left.
func (s *Sandbox) CreateContainer(ctx context.Context, cfg ContainerConfig) (*Container, error) {
	return nil, errdefs.ErrNotImplemented
}

// Container finds a container; ErrNotFound.
func (s *Sandbox) Container(id string) (*Container, error) { return nil, errdefs.ErrNotFound }

// Containers lists the ids, sorted.
func (s *Sandbox) Containers() []string { return nil }

// Stop removes every container, powers the machine off, and removes every
// trace from the host. Idempotent.
func (s *Sandbox) Stop(ctx context.Context) error { return nil }

// Done is closed when the machine is gone, for whatever reason.
func (s *Sandbox) Done() <-chan struct{} { return nil }

// Err says why the machine is gone; nil after Stop.
func (s *Sandbox) Err() error { return nil }

// ContainerConfig is what Create needs.
type ContainerConfig struct {
	ID      string
	Bundle  string
	Spec    *specs.Spec // the host's; not changed
	Rootfs  []storage.Mount
	Streams agent.StreamSet
	// Terminal overrides spec.process.terminal, as containerd's request does.
	Terminal bool
}

// ExecConfig is what Exec needs.
type ExecConfig struct {
	ID       string
	Process  *specs.Process
	Streams  agent.StreamSet
	Terminal bool
}

// Status is a state of containers and processes.
type Status string

// The states; see the table in status.go for the ways between them.
const (
	Created Status = "created"
	Running Status = "running"
	Paused  Status = "paused"
	Stopped Status = "stopped"
)

// A Container is one container of a sandbox.
type Container struct{}

// ID is the container's id.
func (c *Container) ID() string { return "" }

// Bundle is the directory containerd gave.
func (c *Container) Bundle() string { return "" }

// PID is the task pid: a process of the host in the container's network
// namespace, rooted in its root file system.
func (c *Container) PID() int { return 0 }

// Status never asks the guest.
func (c *Container) Status() Status { return "" }

// Init is the first process.
func (c *Container) Init() *Process { return nil }

// Process finds an exec'd process, or Init for the empty id; ErrNotFound.
func (c *Container) Process(execID string) (*Process, error) { return nil, errdefs.ErrNotFound }

// Start runs the first process and the poststart hooks.
func (c *Container) Start(ctx context.Context) error { return errdefs.ErrNotImplemented }

// Exec registers a process; Process.Start starts it. ErrAlreadyExists,
// ErrFailedPrecondition when the container does not run.
func (c *Container) Exec(ctx context.Context, cfg ExecConfig) (*Process, error) {
	return nil, errdefs.ErrNotImplemented
}

// Kill delivers a signal to the first process, or to all. It waits for no
// other call. ErrNotFound after exit.
func (c *Container) Kill(ctx context.Context, signal uint32, all bool) error {
	return errdefs.ErrNotImplemented
}

// Pause freezes the container.
func (c *Container) Pause(ctx context.Context) error { return errdefs.ErrNotImplemented }

// Resume thaws it.
func (c *Container) Resume(ctx context.Context) error { return errdefs.ErrNotImplemented }

// Update changes the resources of a container that was created.
func (c *Container) Update(ctx context.Context, resources *specs.LinuxResources) error {
	return errdefs.ErrNotImplemented
}

// Stats asks the guest; after exit it is the last snapshot, taken when the
// container ended.
func (c *Container) Stats(ctx context.Context) (*protocol.StatsContainerResponse, error) {
	return nil, errdefs.ErrNotImplemented
}

// Pids lists the guest's processes. It answers within a second whatever the
// guest does, and is never empty nor an error before exit: the last known
// list, or the task pid, stands in.
func (c *Container) Pids(ctx context.Context) ([]*extension.ProcessInfo, error) {
	return nil, errdefs.ErrNotImplemented
}

// Delete removes a container that is stopped or was never started: in the
// guest, on the host, poststop hooks. Running: ErrFailedPrecondition. On a
// sandbox whose machine is gone it succeeds.
func (c *Container) Delete(ctx context.Context) error { return errdefs.ErrNotImplemented }

// A Process is the first process of a container or an exec'd one.
type Process struct{}

// ExecID is empty for the first process.
func (p *Process) ExecID() string { return "" }

// Status never asks the guest.
func (p *Process) Status() Status { return "" }

// Start runs an exec'd process.
func (p *Process) Start(ctx context.Context) error { return errdefs.ErrNotImplemented }

// Kill delivers a signal to this process. ErrNotFound after exit.
func (p *Process) Kill(ctx context.Context, signal uint32) error { return errdefs.ErrNotImplemented }

// Resize sets the terminal's size.
func (p *Process) Resize(ctx context.Context, rows, columns uint32) error {
	return errdefs.ErrNotImplemented
}

// Stdin is nil when it was not asked for. Its Close is the end of input.
func (p *Process) Stdin() io.WriteCloser { return nil }

// Stdout ends with io.EOF when everything was read. Valid after
// CreateContainer for the first process and after Start for an exec'd one.
func (p *Process) Stdout() io.Reader { return nil }

// Stderr is as Stdout.
func (p *Process) Stderr() io.Reader { return nil }

// Done is closed when the process has ended, or the machine has.
func (p *Process) Done() <-chan struct{} { return nil }

// Exit says how. Valid after Done; a process that ended with its machine has
// code 137.
func (p *Process) Exit() agent.ExitStatus { return agent.ExitStatus{} }

// Delete forgets an exec'd process that is stopped or was never started.
func (p *Process) Delete(ctx context.Context) error { return errdefs.ErrNotImplemented }

// Reap cleans up after a sandbox whose shim is gone: it reads the state file
// in dir, kills every process named there by pid and start time and every
// other one that carries the sandbox's mark in its environment, removes
// mounts, cgroups, namespaces and files. It never calls the agent. A dir that
// does not exist is success.
func Reap(ctx context.Context, dir string) error { return errdefs.ErrNotImplemented }
