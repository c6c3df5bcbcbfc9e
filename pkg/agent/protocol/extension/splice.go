package extension

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// spliceBuffer is the longest chunk of a spliced connection with its head: what
	// every transport carries in one piece.
	spliceBuffer = 32 << 10
	// spliceWindow is the most bytes that a side has under way without a receipt.
	spliceWindow = 4 * spliceBuffer
	// spliceReceipt marks a head that is a receipt: the rest of it is how many bytes
	// more the other side's TCP connection took.
	spliceReceipt = 1 << 31
)

// Splice carries a TCP connection over a stream connection that was answered:
// each side sends chunks and, where its own TCP connection has no more, the end
// mark; and receipts for what its TCP connection took, as the guest does for stdin.
// It returns when both directions have ended, or one was cut: then with the error,
// and both connections are closed. Otherwise closing them is the caller's, the
// host's first.
func Splice(tcp *net.TCPConn, conn net.Conn) error {
	s := &splice{tcp: tcp, conn: conn, credit: Credit{Most: spliceWindow}}
	s.changed = sync.NewCond(&s.mu)
	var receiver, ways sync.WaitGroup
	receiver.Go(func() { s.fail(s.receive()) })
	ways.Go(func() { s.fail(s.send()) })
	ways.Go(func() { s.fail(s.deliver()) })
	ways.Wait()
	_ = conn.SetReadDeadline(time.Unix(1, 0)) // receipts that nobody needs any more
	receiver.Wait()
	_ = conn.SetReadDeadline(time.Time{})
	return s.err
}

type splice struct {
	tcp    *net.TCPConn
	conn   net.Conn
	writes sync.Mutex // a write to conn

	changed *sync.Cond // of what follows, whose lock is mu
	mu      sync.Mutex
	credit  Credit
	marked  bool   // the end mark is sent, or about to be
	came    []byte // what tcp has not taken yet
	ended   bool   // the other side's end mark has come
	err     error  // the first
}

// fail ends everything, unless err is nil.
func (s *splice) fail(err error) {
	if err == nil {
		return
	}
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.changed.Broadcast()
	s.mu.Unlock()
	_ = s.tcp.SetLinger(0) // the other end shall know that it was cut
	_ = s.tcp.Close()
	_ = s.conn.Close()
}

// Write sends a chunk, a mark or a receipt.
func (s *splice) Write(b []byte) (int, error) {
	s.writes.Lock()
	defer s.writes.Unlock()
	return s.conn.Write(b)
}

// send sends what is read from tcp in chunks, then the end mark.
func (s *splice) send() error {
	buf := make([]byte, spliceBuffer)
	for {
		n, err := s.tcp.Read(buf[ChunkHead:])
		if n > 0 {
			if err := s.reserve(n); err != nil {
				return err
			}
			binary.BigEndian.PutUint32(buf, uint32(n))
			if _, err := s.Write(buf[:ChunkHead+n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			s.mu.Lock()
			s.marked = true
			s.mu.Unlock()
			return WriteEnd(s)
		}
		if err != nil {
			return err
		}
	}
}

// reserve waits until n bytes may be sent.
func (s *splice) reserve(n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && !s.credit.Take(n) {
		s.changed.Wait()
	}
	return s.err
}

// receive never waits for tcp: behind what that does not take there may be receipts.
func (s *splice) receive() error {
	var head [ChunkHead]byte
	buf := make([]byte, spliceBuffer)
	for {
		if _, err := io.ReadFull(s.conn, head[:]); err != nil {
			return s.over(err)
		}
		word := binary.BigEndian.Uint32(head[:])
		var data []byte
		if word&spliceReceipt == 0 {
			if word > spliceBuffer {
				return fmt.Errorf("%w: chunk of %d bytes", ErrMalformed, word)
			}
			data = buf[:word]
			if _, err := io.ReadFull(s.conn, data); err != nil {
				return s.over(err)
			}
		}
		if err := s.received(word, data); err != nil {
			return err
		}
	}
}

func (s *splice) received(word uint32, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.changed.Broadcast()
	switch {
	case word&spliceReceipt != 0:
		return s.credit.Return(int(word &^ spliceReceipt))
	case s.ended:
		return fmt.Errorf("%w: chunk behind the end", ErrMalformed)
	case word == 0:
		s.ended = true
	case len(s.came)+len(data) > spliceWindow:
		return fmt.Errorf("%w: chunk beyond the window", ErrMalformed)
	default:
		s.came = append(s.came, data...)
	}
	return nil
}

// over is what the end of conn is: none where both marks were sent.
func (s *splice) over(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended && s.marked && (errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded)) {
		return nil
	}
	return cut(err)
}

// deliver gives tcp what has come, then ends that direction.
func (s *splice) deliver() error {
	var data []byte
	receipt := &Receipt{W: receipts{s}, Worth: spliceWindow / 4}
	for {
		s.mu.Lock()
		for len(s.came) == 0 && !s.ended && s.err == nil {
			s.changed.Wait()
		}
		data, s.came = s.came, data[:0]
		err := s.err
		s.mu.Unlock()
		if err != nil {
			return err
		}
		if len(data) == 0 {
			return s.tcp.CloseWrite()
		}
		if _, err := s.tcp.Write(data); err != nil {
			return err
		}
		_ = receipt.Took(len(data)) // where it can't be sent nothing can be received either
	}
}

// receipts marks what is written to it as such.
type receipts struct{ s *splice }

func (r receipts) Write(b []byte) (int, error) {
	return r.s.Write(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(b)|spliceReceipt))
}
