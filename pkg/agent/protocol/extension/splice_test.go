package extension

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// tcpPair is both ends of a TCP connection.
func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{conn, other} {
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	return conn.(*net.TCPConn), other.(*net.TCPConn)
}

// spliced is a client and a server with a stream connection between them.
func spliced(t *testing.T) (client, server *net.TCPConn, line net.Conn, wait func() [2]error) {
	client, near := tcpPair(t)
	server, far := tcpPair(t)
	a, b := tcpPair(t) // stands for vsock
	var ways sync.WaitGroup
	var errs [2]error
	ways.Go(func() { errs[0] = Splice(near, a) })
	ways.Go(func() { errs[1] = Splice(far, b) })
	return client, server, a, func() [2]error { ways.Wait(); return errs }
}

func TestSplice(t *testing.T) {
	client, server, _, wait := spliced(t)
	data := make([]byte, 3<<20)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	var sides sync.WaitGroup
	sides.Go(func() { // takes all, then answers
		got, err := io.ReadAll(server)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("server got %d bytes, %v", len(got), err)
		}
		if _, err := server.Write(got[:1<<20]); err != nil {
			t.Error(err)
		}
		_ = server.CloseWrite()
	})
	if _, err := client.Write(data); err != nil {
		t.Error(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Error(err)
	}
	got, err := io.ReadAll(client)
	if err != nil || !bytes.Equal(got, data[:1<<20]) {
		t.Errorf("client got %d bytes, %v", len(got), err)
	}
	sides.Wait()
	if errs := wait(); errs != [2]error{} {
		t.Errorf("errors %v", errs)
	}
}

// A direction in which nobody reads has no more than its window under way, and does
// not stop the other.
func TestSpliceWindow(t *testing.T) {
	client, near := tcpPair(t)
	line, guest := tcpPair(t)
	done := make(chan error, 1)
	go func() { done <- Splice(near, line) }()
	go func() { _, _ = client.Write(make([]byte, 8<<20)) }() // until it is closed

	came := 0
	for came < spliceWindow-spliceBuffer { // a chunk that would exceed it is not sent
		var head [4]byte
		if _, err := io.ReadFull(guest, head[:]); err != nil {
			t.Fatal(err)
		}
		n := int(binary.BigEndian.Uint32(head[:]))
		if _, err := io.ReadFull(guest, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		came += n
	}
	_ = guest.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	rest, err := io.ReadAll(guest)
	if came += len(rest); !errors.Is(err, os.ErrDeadlineExceeded) || came > spliceWindow+4 {
		t.Errorf("%d bytes without a receipt, %v", came, err)
	}
	if err := WriteChunk(guest, []byte("back")); err != nil {
		t.Error(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(client, got); err != nil || string(got) != "back" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := binary.Write(guest, binary.BigEndian, uint32(spliceReceipt|spliceWindow+1)); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v for a receipt of what was not sent", err)
	}
}

func TestSpliceMalformed(t *testing.T) {
	word := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	chunk := append(word(spliceBuffer), make([]byte, spliceBuffer)...)
	for name, wire := range map[string][]byte{
		"receipt":           word(spliceReceipt | 1),
		"chunk":             word(spliceBuffer + 1),
		"behind the end":    append(word(0), word(0)...),
		"beyond the window": bytes.Repeat(chunk, 2*spliceWindow/spliceBuffer),
	} {
		t.Run(name, func(t *testing.T) {
			client, near := tcpPair(t)
			_ = client.SetReadBuffer(4 << 10) // takes little, and is not read
			_ = near.SetWriteBuffer(4 << 10)
			line, guest := tcpPair(t)
			go func() {
				for range 100 { // whatever the client's buffers hold
					if _, err := guest.Write(wire); err != nil {
						return
					}
				}
			}()
			if err := Splice(near, line); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A cut is seen on both sides as one, never as a silent end.
func TestSpliceCut(t *testing.T) {
	for name, cut := range map[string]func(client *net.TCPConn, line net.Conn){
		"line": func(_ *net.TCPConn, line net.Conn) { line.Close() },
		"client": func(client *net.TCPConn, _ net.Conn) {
			_ = client.SetLinger(0)
			client.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, server, line, wait := spliced(t)
			if _, err := client.Write([]byte("half")); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(server, make([]byte, 4)); err != nil {
				t.Error(err)
			}
			cut(client, line)
			if n, err := server.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("server read %d, %v", n, err)
			}
			for _, err := range wait() {
				if err == nil {
					t.Error("no error")
				}
			}
		})
	}
}
