package extension

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
)

// spliceBuffer is the longest chunk of a spliced connection with its head: what
// every transport carries in one piece.
const spliceBuffer = 32 << 10

// Splice carries a TCP connection over a stream connection that was answered:
// each side sends chunks and, where its own TCP connection has no more, the end
// mark. It returns when both directions have ended, or one was cut: then with
// the error, and both connections are closed. Otherwise closing them is the
// caller's, the host's first.
func Splice(tcp *net.TCPConn, conn net.Conn) error {
	var once sync.Once
	var first error
	fail := func(err error) {
		if err == nil {
			return
		}
		once.Do(func() {
			first = err
			_ = tcp.SetLinger(0) // the other end shall know that it was cut
			_ = tcp.Close()
			_ = conn.Close()
		})
	}
	var ways sync.WaitGroup
	ways.Go(func() { fail(sendAll(conn, tcp)) })
	ways.Go(func() { fail(receiveAll(tcp, conn)) })
	ways.Wait()
	return first
}

// sendAll sends what is read from r in chunks, then the end mark.
func sendAll(w io.Writer, r io.Reader) error {
	const head = 4
	buf := make([]byte, spliceBuffer)
	for {
		n, err := r.Read(buf[head:])
		if n > 0 {
			binary.BigEndian.PutUint32(buf, uint32(n))
			if _, werr := w.Write(buf[:head+n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return WriteEnd(w)
		}
		if err != nil {
			return err
		}
	}
}

// receiveAll writes what arrives in chunks, then ends that direction.
func receiveAll(tcp *net.TCPConn, r io.Reader) error {
	chunks := &ChunkReader{R: r}
	buf := make([]byte, spliceBuffer)
	for {
		n, err := chunks.Read(buf)
		if n > 0 {
			if _, werr := tcp.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return tcp.CloseWrite()
		}
		if err != nil {
			return err
		}
	}
}
