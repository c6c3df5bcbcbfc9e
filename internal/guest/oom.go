package guest

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// An oomQueue holds the containers whose OOM kills GetOOMEvent has not told yet,
// each once, oldest first. So it is never longer than there are containers.
type oomQueue struct {
	mu      sync.Mutex
	ids     []string // guarded by mu
	changed chan struct{}
}

func newOOMQueue() *oomQueue { return &oomQueue{changed: make(chan struct{}, 1)} }

func (q *oomQueue) push(id string) {
	q.mu.Lock()
	if !slices.Contains(q.ids, id) {
		q.ids = append(q.ids, id)
	}
	q.mu.Unlock()
	q.wake()
}

func (q *oomQueue) wake() {
	select {
	case q.changed <- struct{}{}:
	default:
	}
}

// drop forgets a container that is removed.
func (q *oomQueue) drop(id string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ids = slices.DeleteFunc(q.ids, func(s string) bool { return s == id })
}

// pop waits for one.
func (q *oomQueue) pop(ctx context.Context) (string, error) {
	for {
		q.mu.Lock()
		if len(q.ids) > 0 && ctx.Err() == nil {
			id := q.ids[0]
			q.ids = q.ids[1:]
			more := len(q.ids) > 0
			q.mu.Unlock()
			if more {
				q.wake()
			}
			return id, nil
		}
		q.mu.Unlock()
		select {
		case <-q.changed:
		case <-ctx.Done():
			q.wake()
			return "", fmt.Errorf("wait for oom event: %w", ctx.Err())
		}
	}
}

// An oomCounter notices the OOM kills of one container. It is asked by the
// watcher and at the end of each process, so that the event comes before the exit.
type oomCounter struct {
	id     string
	group  cgroup
	events *oomQueue

	mu    sync.Mutex
	kills uint64 // guarded by mu
}

// check says whether there were any so far.
func (c *oomCounter) check() bool {
	n := c.group.oomKills()
	c.mu.Lock()
	grew := n > c.kills
	c.kills = max(c.kills, n)
	killed := c.kills > 0
	c.mu.Unlock()
	if grew {
		c.events.push(c.id)
	}
	return killed
}
