package agent

import (
	"sync/atomic"
	"time"
)

const (
	defaultRequestTimeout = 60 * time.Second
	defaultWriteTimeout   = 10 * time.Second
)

// Client is an Agent over ttrpc. It dials when the first call needs it, and
// again after a connection broke. Its methods may be called at the same time.
//
// Goroutines belong to the peer's life (see life.go): Disconnect and MarkDead
// end and join them.
type Client struct {
	peer atomic.Pointer[peer] // never nil; exchanged by ReuseAgent
}

var _ Agent = (*Client)(nil)

// New allocates; nothing is dialed yet.
func New(settings Settings) *Client {
	c := &Client{}
	c.peer.Store(newPeer(settings))
	return c
}

func (s Settings) withDefaults() Settings {
	if s.RequestTimeout <= 0 {
		s.RequestTimeout = defaultRequestTimeout
	}
	if s.WriteTimeout <= 0 {
		s.WriteTimeout = defaultWriteTimeout
	}
	return s
}
