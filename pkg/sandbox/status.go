package sandbox

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// Status is a state of containers and processes.
type Status string

// The states; next has the ways between them.
const (
	Created Status = "created"
	Running Status = "running"
	Paused  Status = "paused"
	Stopped Status = "stopped"
)

// next is every way there is. An end is seen at any time; nothing leads back
// from it.
var next = map[Status][]Status{
	Created: {Running, Stopped},
	Running: {Paused, Stopped},
	Paused:  {Running, Stopped},
}

// leads says whether there is a way.
func (s Status) leads(to Status) bool { return slices.Contains(next[s], to) }

// refused is the error for an operation that the state does not allow.
func refused(what string, s Status) error {
	return fmt.Errorf("cannot %s what is %s: %w", what, s, errdefs.ErrFailedPrecondition)
}
