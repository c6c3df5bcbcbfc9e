package shim

import (
	"context"
	"net"
	"sync"

	"github.com/containerd/ttrpc"
)

// A door lets only the daemon's own user in, and knows who is there: ttrpc's
// server cannot tell whether its last answer was sent, but a client that has
// it hangs up.
type door struct {
	mu    sync.Mutex
	in    int           // guarded by mu
	empty chan struct{} // guarded by mu; closed when nobody is there
}

func newDoor() *door {
	d := &door{empty: make(chan struct{})}
	close(d.empty)
	return d
}

// Handshake implements ttrpc.Handshaker.
func (d *door) Handshake(ctx context.Context, conn net.Conn) (net.Conn, any, error) {
	conn, info, err := ttrpc.UnixSocketRequireSameUser().Handshake(ctx, conn)
	if err != nil {
		return nil, nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.in++; d.in == 1 {
		d.empty = make(chan struct{})
	}
	return &visitor{Conn: conn, door: d}, info, nil
}

func (d *door) left() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.in--; d.in == 0 {
		close(d.empty)
	}
}

// wait waits until nobody is there, or ctx ends.
func (d *door) wait(ctx context.Context) {
	d.mu.Lock()
	empty := d.empty
	d.mu.Unlock()
	select {
	case <-empty:
	case <-ctx.Done():
	}
}

type visitor struct {
	net.Conn
	door *door
	once sync.Once
}

func (v *visitor) Close() error {
	err := v.Conn.Close()
	v.once.Do(v.door.left)
	return err
}
