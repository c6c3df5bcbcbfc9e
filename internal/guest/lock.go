package guest

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// A lock is a mutex that a waiter gives up when its context ends.
type lock chan struct{}

func newLock() lock { return make(lock, 1) }

func (l lock) tryAcquire() bool {
	select {
	case l <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l lock) acquire(ctx context.Context) error {
	if l.tryAcquire() {
		return nil
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for another operation: %w", ctx.Err())
	}
}

func (l lock) release() { <-l }

// waitFor waits for the group, but no longer than the context.
func waitFor(ctx context.Context, group *sync.WaitGroup) {
	done := make(chan struct{})
	go func() {
		group.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

func seconds(n uint32) time.Duration { return time.Duration(n) * time.Second }
