package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// watched are the kernel's groups of messages about what a snapshot has in it.
var watched = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE,
	unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE,
}

// Watch says on a channel that something changed since the last time that this
// was read: a snapshot taken then has it. The channel is closed when ctx has
// ended and nothing of the watch is left, or earlier when the kernel fails.
func (n *Namespace) Watch(ctx context.Context) (<-chan struct{}, error) {
	var socket *nl.NetlinkSocket
	err := n.control(func(fd int) (err error) {
		socket, err = nl.SubscribeAt(netns.NsHandle(fd), netns.None(), unix.NETLINK_ROUTE, watched...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("watch network namespace: %w", err)
	}
	changes := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, socket.Close)
	go func() { // its end closes the channel
		defer close(changes)
		defer func() {
			if stop() {
				socket.Close()
			}
		}()
		for {
			_, _, err := socket.Receive()
			// ENOBUFS: messages were lost, so something changed.
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	return changes, nil
}
