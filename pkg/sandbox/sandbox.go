// Package sandbox is the state machine of a virtual machine and the containers
// in it: the order of start, and of undoing it. It turns a host's OCI
// specification into the guest's, keeps one versioned state file that a later
// process can clean up from, and runs the hooks that belong on the host. It
// speaks neither containerd's types nor QEMU's.
//
// The life of a sandbox:
//
//   - Start makes the directory, the state file, the control group and the
//     share, boots the machine and creates the sandbox in the guest.
//   - CreateContainer may run beside it. It mounts, starts the anchor (the task
//     process) and runs hooks on the host, waits for the guest, and creates the
//     container there.
//   - The machine's end, seen by one goroutine, ends every process with it.
//   - Stop undoes all of it. Reap does the same for a sandbox whose process is
//     gone.
//
// Every goroutine belongs to a Sandbox and is joined by Stop, or by a Start
// that fails; the anchors' by their containers' removal. Locks guard fields
// only: nothing is called, read or waited for under one, so that Kill, Status
// and Pids never wait for a boot, an exec or a guest that hangs.
package sandbox

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/hypervisor"
	"github.com/vmshim/vmshim/pkg/network"
)

// Machine is what a sandbox needs of a running machine; *qemu.VM satisfies it.
type Machine interface {
	Ready() <-chan struct{}
	// Restored says that the guest went on from a template.
	Restored() bool
	Dial(ctx context.Context, port uint32) (net.Conn, error)
	AgentURL(port uint32) string
	Done() <-chan struct{}
	Err() error
	Shutdown(ctx context.Context) error
	Kill() error
	Console() string
	Processes() []hypervisor.Process
	// Examine ends the machine if it can be seen not to work any more.
	Examine()
	PlugNIC(ctx context.Context, nic hypervisor.NIC, taps, vhost []*os.File) (path string, err error)
	UnplugNIC(ctx context.Context, id string) error
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
	// Network says how the pod's interfaces become cards.
	Network network.Config
}

func (c Config) withDefaults() Config {
	for _, d := range []struct {
		of  *time.Duration
		def time.Duration
	}{
		{&c.StartTimeout, time.Minute},
		{&c.StopTimeout, 10 * time.Second},
		{&c.RequestTimeout, time.Minute},
		{&c.HookTimeout, 30 * time.Second},
	} {
		if *d.of <= 0 {
			*d.of = d.def
		}
	}
	return c
}

// Options make a Sandbox.
type Options struct {
	ID        string
	Namespace string // containerd's
	Address   string // of the daemon
	Dir       string // made by Start, removed by Stop; see Dir
	// Pod says that containers come and go, and share what those of a Kubernetes
	// pod share. A container that asks for the host's pid or ipc namespace gets
	// the pod's.
	Pod bool
	// Files are put into every container that has nothing of its own there.
	Files   []File
	Config  Config
	StartVM func(ctx context.Context, spec hypervisor.Spec, opts VMOptions) (Machine, error)
	// MakeTemplate makes the template that such a machine goes on from, where there
	// is to be one and is none, and says whether it did; nothing of it runs afterwards.
	// It is asked for machines of the configured size. Nil: never.
	MakeTemplate func(ctx context.Context, spec hypervisor.Spec, opts VMOptions) (bool, error)
	// OnOOM is called when the guest's kernel killed a process of a container,
	// always before the Done of a process that this ended, and once for each
	// container. It must not block.
	OnOOM func(containerID string)
	// Began is when the work for this sandbox began, for the time line. Zero: now.
	Began time.Time
}

// A Sandbox is one machine and its containers.
type Sandbox struct {
	opts    Options
	state   *store
	network *podNetwork

	prepared chan struct{} // closed when the host's part is there: Dir, share
	running  chan struct{} // closed when there is a machine, and an agent to be
	up       chan struct{} // closed when the guest has the sandbox
	gone     chan struct{} // closed when the machine is gone, or will never be
	stopped  chan struct{} // closed when Stop is through

	boots sync.WaitGroup // Start
	tasks sync.WaitGroup // calls of CreateContainer
	jobs  sync.WaitGroup // goroutines

	ending sync.Once // closes gone

	resizing chan struct{} // has room for one: whoever changes the machine's size

	// Written before up is closed.
	cgroup  *hostCgroup // nil: none
	machine Machine
	agent   guest
	undo    *cleanup.Stack // of Start, for Stop

	// Written before prepared is closed.
	sysctls map[string]string // of the pod, for its containers
	shm     string            // what stands for the pod's /dev/shm in specifications; empty: anything

	mu         sync.Mutex
	starting   bool                  // guarded by mu: Start was called
	stopping   bool                  // guarded by mu: Stop was called
	ended      error                 // guarded by mu: why no call can be served any more
	calls      map[*call]struct{}    // guarded by mu: what ends when the sandbox does
	containers map[string]*Container // guarded by mu; nil while being created
	pod        limits                // guarded by mu: what was said of the pod when it began
	limits     map[string]limits     // guarded by mu: of each container
	aborted    error                 // guarded by mu: why the machine was killed
	err        error                 // guarded by mu: of Err
}

// guest is what a sandbox asks of its agent.
type guest interface {
	agent.Lifecycle
	agent.Containers
	agent.Processes
	agent.Network
	SetGuestDateTime(ctx context.Context, now time.Time) error
	ReseedRNG(ctx context.Context, data []byte) error
	OnlineCPUMem(ctx context.Context, cpus uint32, cpuOnly bool) error
	Connect(ctx context.Context, tcp *net.TCPConn, to netip.AddrPort) error
}

// New allocates; nothing runs yet.
func New(opts Options) (*Sandbox, error) {
	for what, ok := range map[string]bool{
		"id":        opts.ID != "",
		"directory": filepath.IsAbs(opts.Dir),
		"StartVM":   opts.StartVM != nil,
	} {
		if !ok {
			return nil, fmt.Errorf("new sandbox %q: bad %s: %w", opts.ID, what, errdefs.ErrInvalidArgument)
		}
	}
	if opts.OnOOM == nil {
		opts.OnOOM = func(string) {}
	}
	if opts.Began.IsZero() {
		opts.Began = time.Now()
	}
	opts.Config = opts.Config.withDefaults()
	s := &Sandbox{
		opts:       opts,
		state:      newStore(opts),
		prepared:   make(chan struct{}),
		running:    make(chan struct{}),
		up:         make(chan struct{}),
		gone:       make(chan struct{}),
		stopped:    make(chan struct{}),
		calls:      map[*call]struct{}{},
		containers: map[string]*Container{},
		resizing:   make(chan struct{}, 1),
		limits:     map[string]limits{},
	}
	s.network = newPodNetwork(s)
	return s, nil
}

// Dir is where a sandbox keeps its state: root/<16 hex digits>, derived from
// the daemon's address, the namespace and the id.
func Dir(root, address, namespace, id string) string {
	sum := sha256.Sum256([]byte(strings.Join([]string{address, namespace, id}, "\x00")))
	return filepath.Join(root, fmt.Sprintf("%x", sum[:8]))
}

// Container finds a container; ErrNotFound.
func (s *Sandbox) Container(id string) (*Container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

// Containers lists the ids, sorted.
func (s *Sandbox) Containers() []string {
	var ids []string
	for _, c := range s.created() {
		ids = append(ids, c.id)
	}
	return slices.Sorted(slices.Values(ids))
}

// created are the containers that were created.
func (s *Sandbox) created() []*Container {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Collect(maps.Values(s.containers)), func(c *Container) bool { return c == nil })
}

// Done is closed when the machine is gone, for whatever reason.
func (s *Sandbox) Done() <-chan struct{} { return s.gone }

// Err says why the machine is gone; nil after Stop.
func (s *Sandbox) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Mark adds a point to the time line that only the caller knows of.
func (s *Sandbox) Mark(ctx context.Context, phase string, at time.Time) {
	s.state.mark(ctx, phase, at)
}

// path is a file in the sandbox's directory.
func (s *Sandbox) path(name string) string { return filepath.Join(s.opts.Dir, name) }

// share is what the guest may mount.
func (s *Sandbox) share() string { return s.path("share") }

// A call is something that must end when the sandbox does.
type call struct{ cancel context.CancelCauseFunc }

// enter begins a call, counted by wg: its context ends with the sandbox. The
// caller calls leave.
func (s *Sandbox) enter(ctx context.Context, wg *sync.WaitGroup) (_ context.Context, leave func(), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &call{cancel}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		cancel(s.ended)
		return nil, nil, s.ended
	}
	s.calls[c] = struct{}{}
	wg.Add(1)
	return ctx, func() {
		s.mu.Lock()
		delete(s.calls, c)
		s.mu.Unlock()
		cancel(nil)
		wg.Done()
	}, nil
}

// end makes calls fail with cause, those that run and later ones. The first
// cause stays.
func (s *Sandbox) end(cause error) {
	s.mu.Lock()
	if s.ended == nil {
		s.ended = cause
	}
	cause = s.ended
	calls := slices.Collect(maps.Keys(s.calls))
	s.mu.Unlock()
	for _, c := range calls {
		c.cancel(cause)
	}
}

// alive fails when the sandbox can't serve any more.
func (s *Sandbox) alive() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended
}

// within bounds a cleanup: it goes on after the end of ctx, but not for ever.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}
