// Package storage turns the root file system and the mounts of a container
// into what a virtual machine can have: bind mounts below one shared
// directory (virtio-fs), disks, and mounts made in the guest.
//
// Look gathers what must be known of the host, NewPlan decides (pure), Apply
// makes the mounts on the host, and Remove undoes them, for a later process
// too. A mount below the share appears in the guest by itself: MakeShare makes
// the directory propagate mounts to the daemon that serves it.
package storage

// Tag is the mount tag of the sandbox's share, GuestDir where the agent mounts
// it, and GuestShm the shared memory of the sandbox. They are the agent
// protocol's conventions. Below GuestWatched are the copies of small volumes,
// below GuestHugePages volumes of huge pages.
const (
	Tag      = "kataShared"
	GuestDir = "/run/kata-containers/shared/containers"
	GuestShm = "/run/kata-containers/sandbox/shm"

	GuestWatched   = "/run/kata-containers/sandbox/watched"
	GuestHugePages = "/run/kata-containers/sandbox/hugepages"
)

// A Mount is a mount on the host as containerd describes it.
type Mount struct {
	Type    string
	Source  string
	Target  string // below the root file system; usually empty
	Options []string
}
