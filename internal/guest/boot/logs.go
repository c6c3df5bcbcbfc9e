package boot

import (
	"context"
	"io"
	"net"
	"sync"

	"github.com/containerd/log"

	"github.com/vmshim/vmshim/pkg/vsock"
)

const (
	// maxLogReaders is more than a host needs.
	maxLogReaders = 4
	// maxPacket is what one write to a vsock may carry; vhost-device-vsock (0.3)
	// drops the second piece of memory of a longer one.
	maxPacket = 32 << 10
)

// A logServer gives the guest's log to whoever connects: the last consoleBytes,
// and what comes. A reader that is slow loses the oldest and delays nobody.
type logServer struct {
	mu      sync.Mutex
	kept    []byte            // guarded by mu
	readers map[*console]bool // guarded by mu
}

func newLogServer() *logServer { return &logServer{readers: map[*console]bool{}} }

func (s *logServer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = append(s.kept, p...)
	if over := len(s.kept) - consoleBytes; over > 0 {
		s.kept = append(s.kept[:0], s.kept[over:]...)
	}
	for r := range s.readers {
		_, _ = r.Write(p) // into its memory
	}
	return len(p), nil
}

// listen serves the host on a port, to the end of the machine.
func (s *logServer) listen(ctx context.Context, port uint32) {
	l, err := vsock.ListenGuest(port)
	if err != nil {
		log.G(ctx).WithError(err).Warn("log not served")
		return
	}
	s.serve(ctx, l)
}

func (s *logServer) serve(ctx context.Context, l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			log.G(ctx).WithError(err).Warn("log not served any more")
			return
		}
		go s.serveConn(conn)
	}
}

// serveConn serves one reader until it hangs up.
func (s *logServer) serveConn(conn net.Conn) {
	defer conn.Close()
	r := s.add(conn)
	if r == nil {
		return
	}
	_, _ = io.Copy(io.Discard, conn) // it has nothing to say
	s.mu.Lock()
	delete(s.readers, r)
	s.mu.Unlock()
	conn.Close() // and with it a write that nobody takes
	r.Flush(0)
}

func (s *logServer) add(w io.Writer) *console {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.readers) >= maxLogReaders {
		return nil
	}
	r := newConsole(pieces{w})
	s.readers[r] = true
	_, _ = r.Write(s.kept)
	return r
}

// pieces writes no more than maxPacket at once.
type pieces struct{ w io.Writer }

func (p pieces) Write(b []byte) (n int, err error) {
	for err == nil && n < len(b) {
		var k int
		k, err = p.w.Write(b[n:min(n+maxPacket, len(b))])
		n += k
	}
	return n, err
}
