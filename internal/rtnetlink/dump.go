// Package rtnetlink has what the netlink library leaves to its callers.
package rtnetlink

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// maxDumps bounds how often a list is asked for that changes meanwhile.
const maxDumps = 10

// Dump lists something. What the kernel says is incomplete is asked for again.
func Dump[T any](list func() ([]T, error)) ([]T, error) {
	for range maxDumps - 1 {
		if all, err := list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return list()
}
