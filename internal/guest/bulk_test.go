package guest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// Whatever a connection takes of a bulk read, that and no more is said to be sent:
// the rest is whole for the next one.
func TestSendChunks(t *testing.T) {
	data := make([]byte, 2*maxSend+maxSend/2)
	for i := range data {
		data[i] = byte(i % 251)
	}
	const chunk = chunkHead + maxSend
	for _, takes := range []int{0, 2, chunkHead, chunkHead + 5, chunk, chunk + 3, 2*chunk + 100, 1 << 20} {
		var wire bytes.Buffer
		conn := pipeConn{w: &shortWriter{&wire, takes}}
		buf := append(make([]byte, chunkHead), data...)
		sent, err := sendChunks(conn, patience{}, buf)
		if whole := takes > len(buf)+2*chunkHead; whole != (err == nil) {
			t.Errorf("%d bytes taken: %v", takes, err)
		}
		got, _ := io.ReadAll(&extension.ChunkReader{R: &wire})
		if rest := buf[chunkHead+sent:]; !bytes.Equal(append(got, rest...), data) {
			t.Errorf("%d bytes taken: %d arrived, %d left, not what there was", takes, len(got), len(rest))
		}
	}
}

// A shortWriter takes so many bytes and no more.
type shortWriter struct {
	w    io.Writer
	left int
}

func (s *shortWriter) Write(p []byte) (int, error) {
	n, err := s.w.Write(p[:min(len(p), s.left)])
	if s.left -= n; n < len(p) {
		err = errors.New("full")
	}
	return n, err
}

// A wait ends with what it waits for, or soon, also where there is no descriptor.
func TestPatience(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	patience{rawConn(a)}.wait(unix.POLLIN)

	s := &stdio{}
	r, w, err := s.pipe(stdioOptions{}, false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	defer r.Close()
	p := patience{rawConn(r)}
	began := time.Now()
	p.wait(unix.POLLIN)
	if took := time.Since(began); took < lingerTime || took > time.Second {
		t.Errorf("waited %v for nothing, want %v", took, lingerTime)
	}
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	p.wait(unix.POLLIN)
	if n, err := r.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
}
