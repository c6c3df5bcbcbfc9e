// Package guest is the agent as it serves in the virtual machine: containers,
// their processes and streams, storages and the guest itself, by the agent
// protocol on vsock.
//
// The life of a sandbox: Serve listens and says that it does; CreateSandbox
// pins the namespaces that all containers join and mounts what they share;
// containers come and go; DestroySandbox ends everything, and Serve returns so
// that the first process powers off. (Package boot is what happens before and
// around it.)
//
// Who owns what: the server owns the listeners, the sandbox the containers, the
// storages and the pinned namespaces, a container its processes, streams, control
// group and bundle. Every goroutine belongs to the server or to a container,
// which join it.
//
// A signal never waits. Whatever may hang on a dead file system (creating,
// executing, removing) runs in a goroutine of the container under its op lock;
// signals take neither that lock nor libcontainer's, only mutexes that no one
// holds across I/O, and act through a pidfd or cgroup.kill.
//
// The program that calls Serve must import libcontainer/nsenter and call
// libcontainer.Init when its first argument is "init": containers are started by
// executing /proc/self/exe again.
package guest

import (
	"context"
	"path/filepath"
	"time"
)

// APIVersion is the version of the agent protocol, as Health.Version reports it.
const APIVersion = "0.0.1"

// Config says how to serve. The zero value serves on vsock.
type Config struct {
	// Version is the agent's own.
	Version string
	// Addr is where to listen instead of vsock, for tests on a host:
	// unix://PATH or unix://@NAME; the streams are at the same address with
	// "_1028" behind it. vsock://-1:PORT changes only the port.
	Addr string
	// Root is the directory of everything that the agent keeps; /run/kata-containers.
	Root string
	// InitDaemon says that the agent is the guest's init, not a service of one.
	InitDaemon bool
	// PipeSize is the capacity of the pipes that carry standard streams, in
	// bytes; 0 is 256 KiB.
	PipeSize int
	// HotplugTimeout is how long a device may take to appear; 0 is 10 seconds.
	HotplugTimeout time.Duration
	// Ready is called when everything listens, and again for each vsock device
	// that the guest gets later. An error is logged.
	Ready func(ctx context.Context) error
	// LoadModule loads a kernel module; nil refuses requests that need one.
	LoadModule func(ctx context.Context, name string, params []string) error
}

const defaultRoot = "/run/kata-containers"

func (c Config) withDefaults() Config {
	if c.Root == "" {
		c.Root = defaultRoot
	}
	if c.Version == "" {
		c.Version = "unknown"
	}
	return c
}

// Where things are below Root. The first two are the protocol's.
func (c Config) shareDir() string   { return filepath.Join(c.Root, "shared", "containers") }
func (c Config) sandboxDir() string { return filepath.Join(c.Root, "sandbox") }

// bundleDir is not Root/ID, where the protocol's reference has it: a container
// called "shared" or "sandbox" must not meet the directories above.
func (c Config) bundleDir(id string) string { return filepath.Join(c.Root, "bundles", id) }
func (c Config) stateDir() string           { return filepath.Join(c.Root, "state") }
