// Package storage turns the root file system and the mounts of a container
// into what a virtual machine can have: bind mounts below one shared
// directory (virtio-fs), disks, and mounts made in the guest. Planning is
// pure; Apply makes the mounts on the host and returns what undoes them.
package storage

// Tag is the mount tag of the sandbox's share, and GuestDir where the agent
// mounts it. Both are the agent protocol's conventions.
const (
	Tag      = "kataShared"
	GuestDir = "/run/kata-containers/shared/containers"
)

// A Mount is a mount on the host as containerd describes it.
type Mount struct {
	Type    string
	Source  string
	Target  string // below the root file system; usually empty
	Options []string
}
