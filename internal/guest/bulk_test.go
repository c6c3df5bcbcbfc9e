package guest

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// Whatever a connection takes of a bulk read, the rest and no more is given back:
// it is whole for the next one.
func TestChunkBuffer(t *testing.T) {
	const carries = frameSize - extension.ChunkHead
	for _, n := range []int{0, 1, carries - 1, carries, carries + 1, 2*carries + carries/2, 4 * carries} {
		chunks := make(chunkBuffer, bulkBuffer)
		var data []byte
		for _, b := range chunks.room() {
			for i := range b {
				b[i] = byte((len(data) + i) % 251)
			}
			data = append(data, b...)
		}
		data = data[:n]
		for _, takes := range []int{0, 2, extension.ChunkHead, extension.ChunkHead + 5, frameSize, frameSize + 3, 2*frameSize + 100, 1 << 20} {
			var wire bytes.Buffer
			rest, err := chunks.send(&shortWriter{&wire, takes}, n)
			if (err == nil) != (rest == nil) {
				t.Errorf("%d bytes of %d taken: %v, %d left", takes, n, err, len(rest))
			}
			got, _ := io.ReadAll(&extension.ChunkReader{R: &wire})
			if !bytes.Equal(append(got, rest...), data) {
				t.Errorf("%d bytes of %d taken: %d arrived, %d left, not what there was", takes, n, len(got), len(rest))
			}
		}
	}
}

// There are so many large buffers and no more, and each that is given back is
// there for the next one.
func TestBulkBuffers(t *testing.T) {
	buffers := make([]chunkBuffer, maxBulkBuffers+1)
	for i := range buffers {
		buffers[i] = make(chunkBuffer, smallBuffer)
		buffers[i].resize(true)
		buffers[i].resize(true)
	}
	last := &buffers[maxBulkBuffers]
	if len(buffers[0]) != bulkBuffer || len(*last) != smallBuffer {
		t.Errorf("the first has %d bytes, one too many %d", len(buffers[0]), len(*last))
	}
	buffers[0].resize(false)
	if last.resize(true); len(buffers[0]) != smallBuffer || len(*last) != bulkBuffer {
		t.Errorf("%d bytes given back, then %d", len(buffers[0]), len(*last))
	}
	for i := range buffers {
		buffers[i].resize(false)
		buffers[i].resize(false)
	}
	if n := len(bulkBuffers); n != 0 {
		t.Errorf("%d are not given back", n)
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

func testPatients(t *testing.T) (r, w *patient) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r, err := newPatient(fds[0], "r")
	if err != nil {
		t.Fatal(err)
	}
	w, err = newPatient(fds[1], "w")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = r.Close(), w.Close() })
	return r, w
}

// More than fits goes through whole, whoever has to wait, and the end comes behind it.
func TestPatientCopies(t *testing.T) {
	for _, bulk := range []bool{false, true} {
		r, w := testPatients(t)
		data := make([]byte, 1<<20)
		for i := range data {
			data[i] = byte(i % 251)
		}
		wrote := make(chan error, 1)
		go func() {
			n, err := w.Write(data)
			if n != len(data) {
				err = errors.Join(err, io.ErrShortWrite)
			}
			wrote <- errors.Join(err, w.Close())
		}()
		var got []byte
		buf := make([]byte, 100_000)
		for {
			n, err := r.readv([][]byte{buf[:10], buf[10:]}, bulk)
			got = append(got, buf[:n]...)
			if err == nil {
				continue
			}
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
		if err := <-wrote; err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got, data) {
			t.Errorf("bulk %v: %d bytes of %d, or others", bulk, len(got), len(data))
		}
	}
}

// Deadlines and Close end a wait of either kind, and a deadline can be taken back.
func TestPatientEnds(t *testing.T) {
	for _, bulk := range []bool{false, true} {
		r, w := testPatients(t)
		late := time.AfterFunc(20*time.Millisecond, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })
		defer late.Stop()
		if n, err := r.readv([][]byte{make([]byte, 1)}, bulk); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("bulk %v: %d, %v, want the deadline", bulk, n, err)
		}
		if err := r.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := r.readv([][]byte{make([]byte, 2)}, bulk); n != 1 || err != nil {
			t.Errorf("bulk %v: %d, %v, want what was written", bulk, n, err)
		}
		closed := make(chan struct{})
		time.AfterFunc(20*time.Millisecond, func() { _ = r.Close(); close(closed) })
		if n, err := r.readv([][]byte{make([]byte, 1)}, bulk); n != 0 || !errors.Is(err, os.ErrClosed) {
			t.Errorf("bulk %v: %d, %v, want that it is closed", bulk, n, err)
		}
		<-closed
		if _, err := w.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
			t.Errorf("write without a reader: %v", err)
		}
	}
}

// A write that nobody takes ends with its deadline, and says how much went.
func TestPatientUnread(t *testing.T) {
	_, w := testPatients(t)
	late := time.AfterFunc(20*time.Millisecond, func() { _ = w.SetWriteDeadline(time.Unix(1, 0)) })
	defer late.Stop()
	n, err := w.Write(make([]byte, 1<<20))
	if n != 64<<10 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d, %v, want what a pipe holds and the deadline", n, err)
	}
}

// The scheduler hears of a file once for each wait, and not while nobody waits.
func TestPatientQuiet(t *testing.T) {
	r, w := testPatients(t)
	late := time.AfterFunc(20*time.Millisecond, func() { _, _ = w.Write([]byte("x")) })
	defer late.Stop()
	if n, err := r.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Fatalf("%d, %v, want what was written", n, err)
	}
	if r.in.epoll == nil {
		t.Fatal("it was not waited for")
	}
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	raw, err := r.in.epoll.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); n != 0 || err != nil {
			t.Errorf("%d, %v, want nothing to be told", n, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
}
