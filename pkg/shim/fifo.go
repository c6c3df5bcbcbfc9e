package shim

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/fifo"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// openSink opens the path that containerd gave for an output, if it gave one.
func openSink(ctx context.Context, path string) (sink, error) {
	if path == "" {
		return discard{}, nil
	}
	path = strings.TrimPrefix(path, "fifo://")
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode()&fs.ModeNamedPipe == 0 {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		return &fileSink{File: f}, err
	}
	return openFifoSink(ctx, path), nil
}

// discard takes everything.
type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) End() error                  { return nil }
func (discard) Close() error                { return nil }

// A fileSink is a file or a pipe: what was written is there.
type fileSink struct{ *os.File }

func (s *fileSink) End() error { return s.Close() }

// A fifoSink is a fifo with a reader that may come late, go, and come again.
// Until the first one comes nothing is written, and nothing is lost. From then
// on both ends are held: a Write without a reader waits for the next one as
// soon as the fifo is full, instead of failing.
type fifoSink struct {
	cancel context.CancelFunc
	job    sync.WaitGroup // run
	opened chan struct{}  // closed when a reader was there, or never will be
	w      io.WriteCloser // valid once opened is closed; nil without a reader
	ended  chan struct{}  // closed by End
	once   sync.Once      // End
}

func openFifoSink(ctx context.Context, path string) *fifoSink {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // not the request's: ends by Close
	s := &fifoSink{cancel: cancel, opened: make(chan struct{}), ended: make(chan struct{})}
	s.job.Go(func() { s.run(ctx, path) })
	return s
}

func (s *fifoSink) run(ctx context.Context, path string) {
	w, err := fifo.OpenFifo(ctx, path, unix.O_WRONLY, 0) // waits for a reader
	if err != nil {
		close(s.opened)
		return
	}
	keep, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		log.G(ctx).WithError(err).Warn("fifo not held open: output is lost when its reader goes")
	}
	if keep != nil {
		widen(keep)
	}
	s.w = w
	close(s.opened)
	<-s.ended
	_ = keep.Close()
	// What was written stays in the fifo as long as w is open. The end is for
	// a reader that is there, or else for the next one.
	if r, err := fifo.OpenFifo(ctx, path, unix.O_WRONLY, 0); err == nil {
		_ = r.Close()
	}
	_ = w.Close()
}

// widen lets a fifo hold as much as is carried at once: its two ends take turns less
// often. Where the host forbids that, it is slower.
func widen(fifo *os.File) {
	conn, err := fifo.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) {
		if size, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err == nil && size < copyBuffer {
			_, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, copyBuffer)
		}
	})
}

func (s *fifoSink) Write(b []byte) (int, error) {
	<-s.opened
	if s.w == nil {
		return 0, os.ErrClosed
	}
	return s.w.Write(b)
}

func (s *fifoSink) End() error {
	s.once.Do(func() { close(s.ended) })
	return nil
}

func (s *fifoSink) Close() error {
	s.cancel()
	<-s.opened
	if s.w != nil {
		_ = s.w.Close()
	}
	_ = s.End()
	s.job.Wait()
	return nil
}

// An input is where stdin comes from. It is opened when the process runs: what
// a client can write before, it takes for read, and some clients (ctr) are not
// ready to say the end then, and never do.
type input struct {
	path  string
	fifo  bool
	ready chan struct{} // closed when f is set, or never will be

	mu    sync.Mutex
	f     *os.File // guarded by mu until ready is closed; nil: not open
	ended bool     // guarded by mu
	over  bool     // guarded by mu: ready is closed
}

func newInput(path string) (*input, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return &input{path: path, fifo: info.Mode()&fs.ModeNamedPipe != 0, ready: make(chan struct{})}, nil
}

// open lets run begin. Of a fifo it opens both ends: a writer that goes is not
// the end of input, another one may come.
func (in *input) open() error {
	flags := os.O_RDONLY
	if in.fifo {
		flags = os.O_RDWR | unix.O_NONBLOCK
	}
	f, err := os.OpenFile(in.path, flags, 0)
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.over {
		if err == nil {
			_ = f.Close()
		}
		return err
	}
	if err == nil {
		if in.fifo {
			widen(f)
		}
		in.f = f
		in.deadlineLocked()
	}
	in.over = true
	close(in.ready)
	return err
}

// end makes run stop behind what is in the fifo now. A file ends by itself.
func (in *input) end() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ended = true
	in.deadlineLocked()
}

func (in *input) deadlineLocked() {
	if in.ended && in.fifo && in.f != nil {
		_ = in.f.SetReadDeadline(time.Unix(1, 0))
	}
}

// shut lets run end that never began.
func (in *input) shut() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.over {
		in.over = true
		close(in.ready)
	}
}

// close frees. run has ended.
func (in *input) close() {
	if in.f != nil {
		_ = in.f.Close()
	}
}

// run carries the input until end, or the end of a file, and closes w.
func (in *input) run(ctx context.Context, w io.WriteCloser) {
	defer func() {
		if err := w.Close(); err != nil {
			log.G(ctx).WithError(err).Debug("end of input not delivered")
		}
	}()
	<-in.ready
	if in.f == nil {
		return
	}
	buf := make([]byte, copyBuffer)
	for {
		n, err := in.f.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return // the process takes no input any more
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return
		}
	}
	for {
		n := in.readNow(buf)
		if n == 0 {
			return
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return
		}
	}
}

// readNow reads what is there, and does not wait.
func (in *input) readNow(buf []byte) int {
	_ = in.f.SetReadDeadline(time.Time{})
	conn, err := in.f.SyscallConn()
	if err != nil {
		return 0
	}
	var n int
	err = conn.Read(func(fd uintptr) bool {
		n, _ = unix.Read(int(fd), buf)
		return true
	})
	if err != nil || n < 0 {
		return 0
	}
	return n
}
