package qemu

import (
	"bytes"
	"net"
	"testing"
)

// FuzzToken: only the token rings, whatever a guest says, and no more than a
// token is read.
func FuzzToken(f *testing.F) {
	const token = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	f.Add([]byte(token + "\n"))
	f.Add([]byte(token))
	f.Add([]byte(token + "\n\n"))
	f.Add([]byte("\n" + token))
	f.Add(bytes.Repeat([]byte("A"), 1<<16))
	f.Fuzz(func(t *testing.T, said []byte) {
		host, guest := net.Pipe()
		taken := make(chan int, 1)
		go func() {
			n, _ := guest.Write(said)
			guest.Close()
			taken <- n
		}()
		rung := (&doorbell{token: token}).hear(host)
		host.Close()
		if want := bytes.HasPrefix(said, []byte(token+"\n")); rung != want {
			t.Errorf("%q rings: %v", said, rung)
		}
		if n := <-taken; n > len(token)+1 {
			t.Errorf("%d bytes were read", n)
		}
	})
}
