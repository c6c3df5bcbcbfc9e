package agent

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// A peer is one guest: how to reach it and what is known of it. It outlives
// its connections, and a Client when another one takes it over.
type peer struct {
	processes processes
	oom       oomEvents

	mu           sync.Mutex
	settings     Settings      // guarded by mu
	port         uint32        // of the agent; guarded by mu
	life         *life         // never nil; guarded by mu
	dead         error         // set by markDead; guarded by mu
	capabilities *Capabilities // once asked; guarded by mu
}

func newPeer(settings Settings) *peer {
	p := &peer{
		settings:  settings.withDefaults(),
		port:      extension.AgentPort,
		processes: processes{known: map[process]*processState{}},
		oom:       oomEvents{turn: newTurn()},
	}
	p.life = newLife(p)
	return p
}

// enter joins the current life for one call or job, which leaves it at its end.
func (p *peer) enter() (*life, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead != nil {
		return nil, p.dead
	}
	p.life.jobs.Add(1)
	return p.life, nil
}

func (p *peer) current() Settings {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.settings
}

// configure changes the settings. The address is kept when the new ones have none.
func (p *peer) configure(s Settings) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s = s.withDefaults()
	if s.Dial == nil && s.URL == "" {
		s.Dial, s.URL = p.settings.Dial, p.settings.URL
	}
	p.settings = s
}

// address is where to dial. It parses the URL when no dialer was given.
func (p *peer) address() (vsock.Dialer, uint32, error) {
	p.mu.Lock()
	s, port := p.settings, p.port
	p.mu.Unlock()
	if s.Dial != nil {
		return s.Dial, port, nil
	}
	if s.URL == "" {
		return nil, 0, errNoAddress
	}
	return parse(s.URL)
}

func parse(url string) (vsock.Dialer, uint32, error) {
	dial, port, err := vsock.Parse(url)
	if err != nil {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return dial, port, err
}

func (p *peer) setURL(url string) error {
	dial, port, err := parse(url)
	if err != nil {
		return &Error{Err: err}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.settings.Dial, p.settings.URL, p.port = dial, url, port
	return nil
}

// disconnect ends the current life and waits for everything in it.
func (p *peer) disconnect() {
	p.end(fmt.Errorf("disconnected: %w", errdefs.ErrUnavailable), false)
}

// markDead does the same for good.
func (p *peer) markDead(cause error) {
	err := fmt.Errorf("guest is gone: %w", errdefs.ErrUnavailable)
	if cause != nil {
		err = fmt.Errorf("guest is gone: %w: %w", errdefs.ErrUnavailable, cause)
	}
	p.end(err, true)
}

func (p *peer) end(cause error, dead bool) {
	p.mu.Lock()
	if dead && p.dead == nil {
		p.dead = cause
	}
	l := p.life
	p.life = newLife(p)
	p.mu.Unlock()
	l.end(cause)
}
