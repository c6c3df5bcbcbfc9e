package network

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCatch has one listener take what is meant for any address.
func TestCatch(t *testing.T) {
	p := newPod(t)
	p.up("lo")
	p.veth("02:00:00:00:00:02", "10.1.0.2/24")
	c, err := p.Catch(t.Context())
	p.must(err)
	dial := func(to string) (conn net.Conn, err error) {
		err = p.inside(func() (err error) {
			conn, err = net.DialTimeout("tcp", to, 5*time.Second)
			return err
		})
		return conn, err
	}
	for _, to := range []string{"127.0.0.1:80", "[::1]:8080", "10.1.0.2:9"} {
		conn, err := dial(to)
		if err != nil {
			t.Errorf("%s: %v", to, err)
			continue
		}
		p.must(c.SetDeadline(time.Now().Add(5 * time.Second)))
		got, err := c.AcceptTCP()
		p.must(err)
		meant := got.LocalAddr().(*net.TCPAddr).AddrPort()
		if text := netip.AddrPortFrom(meant.Addr().Unmap(), meant.Port()).String(); text != to {
			t.Errorf("accepted for %s, want %s", text, to)
		}
		p.must(got.Close())
		p.must(conn.Close())
	}
	p.must(c.Close())
	if conn, err := dial("127.0.0.1:80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("after the end: %v, %v", conn, err)
	}
}
