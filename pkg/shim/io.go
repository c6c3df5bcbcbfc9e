package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
)

const (
	// copyBuffer is what is carried at once: a chunk of a stream.
	copyBuffer = 256 << 10

	// The bounds of deliver: how long a stream that ought to end may say
	// nothing, how long a reader may take nothing, and how much may still come
	// of a process that has ended. The last is more than all buffers between
	// the process and its reader hold: what is behind it was written by a child
	// that lives on.
	silentTimeout = time.Second
	stuckTimeout  = 10 * time.Second
	maxTail       = 8 << 20
)

// stdio is where containerd wants the streams of a process: paths of fifos or
// files, or in stdout the URI of a logger (binary:, binary-v2:) or a file
// (file:) for both outputs. Empty: nobody wants it.
type stdio struct {
	stdin, stdout, stderr string
	terminal              bool
}

// stdioOf is what a Create or Exec asks for.
func stdioOf(r interface {
	GetStdin() string
	GetStdout() string
	GetStderr() string
	GetTerminal() bool
},
) stdio {
	return stdio{stdin: r.GetStdin(), stdout: r.GetStdout(), stderr: r.GetStderr(), terminal: r.GetTerminal()}
}

// streams is what a process in the guest offers; see sandbox.Process.
type streams interface {
	Stdin() io.WriteCloser
	Stdout() io.Reader
	Stderr() io.Reader
}

// A sink takes the bytes of an output. End says that no more come, so that
// readers see the end; Close frees what is left, and ends a blocked Write.
type sink interface {
	io.WriteCloser
	End() error
}

// A relay carries the streams of one process between the guest and what
// containerd named.
type relay struct {
	stdin          *input // nil: there is none
	stdout, stderr sink   // nil: there is none
	logger         *logger

	outputs sync.WaitGroup
	inputs  sync.WaitGroup
	drained chan struct{} // closed when all outputs were carried to their end
	closing sync.Once

	moved   atomic.Int64 // bytes written to sinks
	last    atomic.Int64 // when, in nanoseconds since the epoch
	writing atomic.Int32 // sinks that have not yet taken what was read for them
}

// newRelay opens everything that is wanted.
func newRelay(ctx context.Context, id, namespace string, s stdio) (_ *relay, err error) {
	r := &relay{drained: make(chan struct{})}
	defer func() {
		if err != nil {
			r.close(ctx)
		}
	}()
	uri, err := url.Parse(s.stdout)
	if err != nil {
		return nil, fmt.Errorf("parse stdout: %w", err)
	}
	switch uri.Scheme {
	case "", "fifo":
		err = r.openPaths(ctx, s)
	case "file":
		err = r.openFile(uri.Path, s.terminal)
	case "binary", "binary-v2":
		err = r.openLogger(ctx, uri, id, namespace, s.terminal)
	default:
		err = fmt.Errorf("stdout %q: unknown scheme", s.stdout)
	}
	if err != nil {
		return nil, err
	}
	if s.stdin != "" {
		if r.stdin, err = newInput(s.stdin); err != nil {
			return nil, fmt.Errorf("open stdin: %w", err)
		}
	}
	return r, nil
}

func (r *relay) openPaths(ctx context.Context, s stdio) (err error) {
	if r.stdout, err = openSink(ctx, s.stdout); err != nil {
		return fmt.Errorf("open stdout: %w", err)
	}
	if s.terminal {
		return nil
	}
	if r.stderr, err = openSink(ctx, s.stderr); err != nil {
		return fmt.Errorf("open stderr: %w", err)
	}
	return nil
}

func (r *relay) openFile(path string, terminal bool) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make log directory: %w", err)
	}
	open := func() (sink, error) {
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		return &fileSink{File: f}, err
	}
	var err error
	if r.stdout, err = open(); err == nil && !terminal {
		r.stderr, err = open()
	}
	return err
}

func (r *relay) openLogger(ctx context.Context, uri *url.URL, id, namespace string, terminal bool) error {
	l, err := startLogger(ctx, uri, id, namespace)
	if err != nil {
		return fmt.Errorf("start logger %s: %w", uri.Path, err)
	}
	r.logger, r.stdout = l, l.stdout
	if terminal {
		return l.stderr.End()
	}
	r.stderr = l.stderr
	return nil
}

// wants says which streams are to be opened in the guest. Outputs that nobody
// asked for are read all the same: the process must not block.
func (r *relay) wants() (stdin, stdout, stderr bool) {
	return r.stdin != nil, r.stdout != nil, r.stderr != nil
}

// start begins to copy. It is called once, or never.
func (r *relay) start(ctx context.Context, p streams) {
	r.touch()
	if r.stdin != nil && p.Stdin() != nil {
		r.inputs.Go(func() { r.stdin.run(ctx, p.Stdin()) })
	}
	if r.stdout != nil && p.Stdout() != nil {
		r.outputs.Go(func() { r.copy(ctx, r.stdout, p.Stdout()) })
	}
	if r.stderr != nil && p.Stderr() != nil {
		r.outputs.Go(func() { r.copy(ctx, r.stderr, p.Stderr()) })
	}
	r.inputs.Go(func() {
		r.outputs.Wait()
		close(r.drained)
	})
}

func (r *relay) touch() { r.last.Store(time.Now().UnixNano()) }

// copy carries an output to its end. A sink that fails does not stop it: the
// process must not hang because its log does not take anything any more.
func (r *relay) copy(ctx context.Context, dst sink, src io.Reader) {
	defer func() { _ = dst.End() }()
	buf := make([]byte, copyBuffer)
	warned := false
	for {
		n, err := src.Read(buf)
		if n > 0 {
			r.touch()
			r.writing.Add(1)
			_, werr := dst.Write(buf[:n])
			r.writing.Add(-1)
			r.moved.Add(int64(n))
			r.touch()
			if werr != nil && !warned && !errors.Is(werr, os.ErrClosed) {
				warned = true
				log.G(ctx).WithError(werr).Warn("output lost: it cannot be written, the process goes on")
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				log.G(ctx).WithError(err).Debug("output cut")
			}
			return
		}
	}
}

// settle waits until all output was delivered, but not for long.
func (r *relay) settle(ctx context.Context, bound time.Duration) {
	timeout := time.NewTimer(bound)
	defer timeout.Stop()
	select {
	case <-r.drained:
	case <-timeout.C:
	case <-ctx.Done():
	}
}

// deliver waits until all output of a process that has ended was delivered, as
// long as it gets on.
func (r *relay) deliver(ctx context.Context) {
	begin, mark := time.Now(), r.moved.Load()
	for r.moved.Load()-mark < maxTail {
		last := time.Unix(0, r.last.Load())
		if last.Before(begin) {
			last = begin
		}
		limit := silentTimeout
		if r.writing.Load() > 0 {
			limit = stuckTimeout
		}
		left := time.Until(last.Add(limit))
		if left <= 0 {
			return
		}
		timeout := time.NewTimer(left)
		select {
		case <-r.drained:
		case <-ctx.Done():
		case <-timeout.C:
			continue
		}
		timeout.Stop()
		return
	}
}

// openInput lets input in: the process runs.
func (r *relay) openInput(ctx context.Context) {
	if r.stdin == nil {
		return
	}
	if err := r.stdin.open(); err != nil {
		log.G(ctx).WithError(err).Warn("stdin not opened; the process gets none")
	}
}

// endInput is the end of stdin, behind what is in it now.
func (r *relay) endInput() {
	if r.stdin != nil {
		r.stdin.end()
	}
}

// close frees everything and joins the copying, whose other ends are closed.
// It may be called again.
func (r *relay) close(ctx context.Context) { r.closing.Do(func() { r.free(ctx) }) }

func (r *relay) free(ctx context.Context) {
	r.endInput()
	if r.stdin != nil {
		r.stdin.shut()
	}
	for _, s := range []sink{r.stdout, r.stderr} {
		if s != nil {
			_ = s.Close()
		}
	}
	r.outputs.Wait()
	r.inputs.Wait()
	if r.stdin != nil {
		r.stdin.close()
	}
	if r.logger != nil {
		r.logger.close(ctx)
	}
}
