package extension

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
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
