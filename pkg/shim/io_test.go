package shim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// guestEnds are the streams of a process, and the process's ends of them.
type guestEnds struct {
	stdin          io.WriteCloser
	stdout, stderr io.Reader

	in       io.Reader
	out, err io.WriteCloser
}

func (g *guestEnds) Stdin() io.WriteCloser { return g.stdin }
func (g *guestEnds) Stdout() io.Reader     { return g.stdout }
func (g *guestEnds) Stderr() io.Reader     { return g.stderr }

func newGuestEnds(tb testing.TB) *guestEnds {
	tb.Helper()
	var g guestEnds
	for _, ends := range []struct {
		r *io.Reader
		w *io.WriteCloser
	}{{&g.in, &g.stdin}, {&g.stdout, &g.out}, {&g.stderr, &g.err}} {
		r, w, err := os.Pipe()
		if err != nil {
			tb.Fatal(err)
		}
		*ends.r, *ends.w = r, w
		tb.Cleanup(func() {
			_ = r.Close()
			_ = w.Close()
		})
	}
	return &g
}

// fifos makes the three fifos that containerd's clients make.
func fifos(tb testing.TB) stdio {
	tb.Helper()
	dir := tb.TempDir()
	s := stdio{
		stdin:  filepath.Join(dir, "in"),
		stdout: filepath.Join(dir, "out"),
		stderr: filepath.Join(dir, "err"),
	}
	for _, path := range []string{s.stdin, s.stdout, s.stderr} {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	return s
}

func openRelay(tb testing.TB, s stdio, p streams) *relay {
	tb.Helper()
	r, err := newRelay(tb.Context(), "id", "ns", s)
	if err != nil {
		tb.Fatal(err)
	}
	if p != nil {
		r.start(tb.Context(), p)
		r.openInput(tb.Context())
	}
	tb.Cleanup(func() {
		if g, ok := p.(*guestEnds); ok { // as the sandbox does it before
			_ = g.out.Close()
			_ = g.err.Close()
		}
		soon(tb, "close relay", func() { r.close(context.WithoutCancel(tb.Context())) })
	})
	return r
}

// reader opens a fifo and reads it to its end, as a client does.
func reader(tb testing.TB, path string) <-chan []byte {
	tb.Helper()
	got := make(chan []byte, 1)
	go func() {
		f, err := os.OpenFile(path, os.O_RDONLY, 0)
		if err != nil {
			got <- []byte(err.Error())
			return
		}
		defer f.Close()
		b, _ := io.ReadAll(f)
		got <- b
	}()
	return got
}

func receive(tb testing.TB, what string, ch <-chan []byte) []byte {
	tb.Helper()
	select {
	case b := <-ch:
		return b
	case <-time.After(20 * time.Second):
		tb.Fatalf("%s: nothing after 20 s", what)
		return nil
	}
}

func write(tb testing.TB, w io.Writer, text string) {
	tb.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		tb.Fatal(err)
	}
}

func TestRelayFifos(t *testing.T) {
	s, g := fifos(t), newGuestEnds(t)
	out, errs := reader(t, s.stdout), reader(t, s.stderr)
	r := openRelay(t, s, g)
	if in, out, err := r.wants(); !in || !out || !err {
		t.Errorf("wants() = %v %v %v", in, out, err)
	}
	client, err := os.OpenFile(s.stdin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	write(t, client, "question\n")
	line := make([]byte, 9)
	if _, err := io.ReadFull(g.in, line); err != nil || string(line) != "question\n" {
		t.Errorf("stdin: %q, %v", line, err)
	}
	write(t, g.out, "answer\n")
	write(t, g.err, "complaint\n")
	_ = g.out.Close()
	_ = g.err.Close()
	if got := receive(t, "stdout", out); string(got) != "answer\n" {
		t.Errorf("stdout: %q", got)
	}
	if got := receive(t, "stderr", errs); string(got) != "complaint\n" {
		t.Errorf("stderr: %q", got)
	}
	soon(t, "drain", func() { <-r.drained })
}

// A client that goes and comes back finds the same stdin; only CloseIO ends it,
// behind what is in the fifo.
func TestRelayStdin(t *testing.T) {
	s, g := fifos(t), newGuestEnds(t)
	r := openRelay(t, stdio{stdin: s.stdin}, g)
	for i := range 3 {
		client, err := os.OpenFile(s.stdin, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		write(t, client, fmt.Sprintln(i))
		_ = client.Close()
		line := make([]byte, 2)
		if _, err := io.ReadFull(g.in, line); err != nil || string(line) != fmt.Sprintln(i) {
			t.Fatalf("stdin: %q, %v", line, err)
		}
	}
	client, err := os.OpenFile(s.stdin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close() // still open at the end of input, as ctr's is
	write(t, client, strings.Repeat("x", 60000))
	r.endInput()
	r.endInput()
	soon(t, "end of input", func() {
		rest, err := io.ReadAll(g.in)
		if err != nil || len(rest) != 60000 {
			t.Errorf("stdin: %d bytes at its end, %v; want 60000", len(rest), err)
		}
	})
}

// Nobody can write before the process runs: a client that is through by then
// may not be able to say so yet (ctr is not).
func TestRelayStdinBeforeStart(t *testing.T) {
	s, g := fifos(t), newGuestEnds(t)
	r := openRelay(t, stdio{stdin: s.stdin}, nil)
	r.start(t.Context(), g)
	if _, err := os.OpenFile(s.stdin, os.O_WRONLY|unix.O_NONBLOCK, 0); !errors.Is(err, unix.ENXIO) {
		t.Errorf("open for writing before the process runs: %v", err)
	}
	r.openInput(t.Context())
	client, err := os.OpenFile(s.stdin, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	write(t, client, "early")
	_ = client.Close()
	r.endInput()
	_ = g.out.Close()
	_ = g.err.Close()
	soon(t, "end of input", func() {
		if rest, err := io.ReadAll(g.in); err != nil || string(rest) != "early" {
			t.Errorf("stdin: %q, %v", rest, err)
		}
	})
}

// CloseIO of a process that was not started is the end of its input.
func TestRelayStdinEndsBeforeStart(t *testing.T) {
	s, g := fifos(t), newGuestEnds(t)
	r := openRelay(t, stdio{stdin: s.stdin}, nil)
	r.start(t.Context(), g)
	r.endInput()
	r.openInput(t.Context())
	_ = g.out.Close()
	_ = g.err.Close()
	soon(t, "end of input", func() {
		if rest, err := io.ReadAll(g.in); err != nil || len(rest) != 0 {
			t.Errorf("stdin: %q, %v", rest, err)
		}
	})
}

func TestRelayStdinFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(path, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	g := newGuestEnds(t)
	openRelay(t, stdio{stdin: path}, g)
	soon(t, "end of input", func() {
		if rest, err := io.ReadAll(g.in); err != nil || string(rest) != "from a file" {
			t.Errorf("stdin: %q, %v", rest, err)
		}
	})
}

// A process that takes no input does not keep the relay.
func TestRelayStdinFull(t *testing.T) {
	s, g := fifos(t), newGuestEnds(t)
	r, err := newRelay(t.Context(), "id", "ns", stdio{stdin: s.stdin})
	if err != nil {
		t.Fatal(err)
	}
	r.start(t.Context(), g)
	r.openInput(t.Context())
	client, err := os.OpenFile(s.stdin, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	_ = client.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	if _, err := client.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("write to a process that does not read: %v", err)
	}
	for _, end := range []io.Closer{g.in.(io.Closer), g.out, g.err} { // the process ends
		_ = end.Close()
	}
	soon(t, "close relay", func() { r.close(t.Context()) })
}

// A reader that comes after the process has ended gets everything.
func TestRelayLateReader(t *testing.T) {
	s, g := fifos(t), newGuestEnds(t)
	r := openRelay(t, s, g)
	write(t, g.out, "all of it")
	_ = g.out.Close()
	_ = g.err.Close()
	r.settle(t.Context(), 50*time.Millisecond)
	if got := receive(t, "stdout", reader(t, s.stdout)); string(got) != "all of it" {
		t.Errorf("stdout: %q", got)
	}
	if got := receive(t, "stderr", reader(t, s.stderr)); len(got) > 0 {
		t.Errorf("stderr: %q", got)
	}
	soon(t, "drain", func() { <-r.drained })
}

// A reader that goes does not end the output; what the fifo holds is for the
// next one.
func TestRelayReaderComesBack(t *testing.T) {
	s, g := fifos(t), newGuestEnds(t)
	openRelay(t, stdio{stdout: s.stdout}, g)
	first, err := os.OpenFile(s.stdout, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	write(t, g.out, "one")
	b := make([]byte, 3)
	if _, err := io.ReadFull(first, b); err != nil {
		t.Fatal(err)
	}
	_ = first.Close()
	write(t, g.out, "two")
	out := reader(t, s.stdout)
	write(t, g.out, "three")
	_ = g.out.Close()
	_ = g.err.Close()
	if got := receive(t, "stdout", out); string(got) != "twothree" {
		t.Errorf("stdout of the second reader: %q", got)
	}
}

// 20 MiB to a reader that is slow at first, after the process has ended.
func TestRelaySlowReader(t *testing.T) {
	const size = 20 << 20
	s, g := fifos(t), newGuestEnds(t)
	r := openRelay(t, stdio{stdout: s.stdout}, g)
	rnd := rand.New(rand.NewPCG(1, 2))
	sent, got := sha256.New(), sha256.New()
	_ = g.err.Close()
	go func() {
		defer g.out.Close()
		chunk := make([]byte, 64<<10)
		for range size / len(chunk) {
			for i := range chunk {
				chunk[i] = byte(rnd.Uint32())
			}
			sent.Write(chunk)
			if _, err := g.out.Write(chunk); err != nil {
				return
			}
		}
	}()
	client, err := os.OpenFile(s.stdout, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	delivered := make(chan struct{})
	go func() {
		defer close(delivered)
		r.deliver(t.Context())
	}()
	soon(t, "read", func() {
		time.Sleep(1500 * time.Millisecond) // longer than silence is allowed to be
		if n, err := io.Copy(got, client); err != nil || n != size {
			t.Errorf("%d bytes of %d, %v", n, size, err)
		}
		<-delivered
		<-r.drained
	})
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Error("bytes differ")
	}
}

// deliver does not wait for what will never end.
func TestRelayDeliverGivesUp(t *testing.T) {
	t.Run("silent", func(t *testing.T) { // a child of an exec'd process holds its stdout
		s, g := fifos(t), newGuestEnds(t)
		r := openRelay(t, stdio{stdout: s.stdout}, g)
		begin := time.Now()
		r.deliver(t.Context())
		if took := time.Since(begin); took < silentTimeout/2 || took > 3*silentTimeout {
			t.Errorf("took %v", took)
		}
		_ = g.out.Close()
	})
	t.Run("noisy", func(t *testing.T) { // it even writes
		s, g := fifos(t), newGuestEnds(t)
		r := openRelay(t, stdio{stdout: s.stdout}, g)
		client, err := os.OpenFile(s.stdout, os.O_RDONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.Copy(io.Discard, client) }()
		go func() {
			chunk := make([]byte, 64<<10)
			for {
				if _, err := g.out.Write(chunk); err != nil {
					return
				}
			}
		}()
		soon(t, "deliver", func() { r.deliver(t.Context()) })
		_ = g.out.Close()
		_ = g.err.Close()
		soon(t, "drain", func() { <-r.drained })
		_ = client.Close()
	})
	t.Run("canceled", func(t *testing.T) {
		s, g := fifos(t), newGuestEnds(t)
		r := openRelay(t, stdio{stdout: s.stdout}, g)
		write(t, g.out, "nobody reads this")
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		begin := time.Now()
		r.deliver(ctx)
		if took := time.Since(begin); took > silentTimeout {
			t.Errorf("took %v", took)
		}
		_ = g.out.Close()
	})
}

func TestRelayFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "deep", "log")
	for _, line := range []string{"one\n", "two\n"} {
		g := newGuestEnds(t)
		r := openRelay(t, stdio{stdout: "file://" + path, stderr: "file://" + path}, g)
		write(t, g.out, line)
		_ = g.out.Close()
		_ = g.err.Close()
		soon(t, "drain", func() { <-r.drained })
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "one\ntwo\n" {
		t.Errorf("%q, %v", got, err)
	}
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	g := newGuestEnds(t)
	r := openRelay(t, stdio{stdout: plain}, g)
	write(t, g.out, "after\n")
	_ = g.out.Close()
	_ = g.err.Close()
	soon(t, "drain", func() { <-r.drained })
	if got, err := os.ReadFile(plain); err != nil || string(got) != "before\nafter\n" {
		t.Errorf("%q, %v", got, err)
	}
}

// Nobody wants anything, and the process does not block.
func TestRelayNone(t *testing.T) {
	g := newGuestEnds(t)
	r := openRelay(t, stdio{}, g)
	if in, out, err := r.wants(); in || !out || !err {
		t.Errorf("wants() = %v %v %v", in, out, err)
	}
	r.endInput()
	soon(t, "write", func() { write(t, g.out, strings.Repeat("x", 1<<20)) })
	_ = g.out.Close()
	_ = g.err.Close()
	soon(t, "drain", func() { <-r.drained })
}

func TestRelayTerminal(t *testing.T) {
	s := fifos(t)
	s.terminal = true
	r := openRelay(t, s, nil)
	if in, out, err := r.wants(); !in || !out || err {
		t.Errorf("wants() = %v %v %v", in, out, err)
	}
}

func TestRelayErrors(t *testing.T) {
	s := fifos(t)
	missing := filepath.Join(t.TempDir(), "missing")
	for _, c := range []struct {
		name string
		stdio
		want string
	}{
		{"stdout missing", stdio{stdin: s.stdin, stdout: missing}, "open stdout"},
		{"stderr missing", stdio{stdout: s.stdout, stderr: missing}, "open stderr"},
		{"stdin missing", stdio{stdin: missing, stdout: s.stdout}, "open stdin"},
		{"scheme", stdio{stdout: "gopher://x"}, "unknown scheme"},
		{"logger missing", stdio{stdout: "binary://" + missing}, "start logger"},
		{"file in no directory", stdio{stdout: "file:///dev/null/x"}, "make log directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := newRelay(t.Context(), "id", "ns", c.stdio)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q in it", err, c.want)
			}
		})
	}
}

// A logger copies its inputs to files and says what it was told.
func loggerMain(args []string) int {
	ready := os.NewFile(5, "ready")
	flags := map[string]string{}
	for i := 0; i+1 < len(args); i += 2 {
		flags[args[i]] = args[i+1]
	}
	dir := flags["dir"]
	env := strings.Join(os.Environ(), " ") + " " + strings.Join(args, " ")
	if err := os.WriteFile(filepath.Join(dir, "env"), []byte(env), 0o600); err != nil {
		return 1
	}
	switch flags["mode"] {
	case "dies":
		return 3
	case "hangs":
		select {}
	}
	_, _ = ready.Write([]byte{0})
	_ = ready.Close()
	done := make(chan error, 2)
	for fd, name := range map[uintptr]string{3: "stdout", 4: "stderr"} {
		go func() {
			f, err := os.Create(filepath.Join(dir, name))
			if err == nil {
				_, err = io.Copy(f, os.NewFile(fd, name))
			}
			done <- err
		}()
	}
	if err := errors.Join(<-done, <-done); err != nil {
		return 1
	}
	return 0
}

func loggerURI(tb testing.TB, scheme, mode, dir string) string {
	tb.Helper()
	self, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	return fmt.Sprintf("%s://%s?logger=&dir=%s&mode=%s&key=a%%20b", scheme, self, dir, mode)
}

func TestRelayLogger(t *testing.T) {
	t.Setenv("GORACE", "atexit_sleep_ms=0")
	for _, scheme := range []string{"binary", "binary-v2"} {
		t.Run(scheme, func(t *testing.T) {
			dir, g := t.TempDir(), newGuestEnds(t)
			r, err := newRelay(t.Context(), "the-id", "the-ns", stdio{stdout: loggerURI(t, scheme, "", dir)})
			if err != nil {
				t.Fatal(err)
			}
			r.start(t.Context(), g)
			r.openInput(t.Context())
			write(t, g.out, "to the log")
			write(t, g.err, "with a complaint")
			_ = g.out.Close()
			_ = g.err.Close()
			begin := time.Now()
			soon(t, "close relay", func() { <-r.drained; r.close(t.Context()) })
			if took := time.Since(begin); took > loggerGrace {
				t.Errorf("logger ended after %v, by a signal", took)
			}
			for name, want := range map[string]string{
				"stdout": "to the log",
				"stderr": "with a complaint",
				"env":    "CONTAINER_ID=the-id CONTAINER_NAMESPACE=the-ns dir " + dir + " mode  key a b",
			} {
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v; want %q", name, got, err, want)
				}
			}
		})
	}
	t.Run("not ready", func(t *testing.T) {
		_, err := newRelay(t.Context(), "id", "ns", stdio{stdout: loggerURI(t, "binary-v2", "dies", t.TempDir())})
		if err == nil || !strings.Contains(err.Error(), "before it was ready") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("never ready", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		_, err := newRelay(ctx, "id", "ns", stdio{stdout: loggerURI(t, "binary", "hangs", t.TempDir())})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("dies", func(t *testing.T) { // the process goes on
		dir, g := t.TempDir(), newGuestEnds(t)
		r := openRelay(t, stdio{stdout: loggerURI(t, "binary", "dies", dir)}, g)
		soon(t, "logger's end", func() { <-r.logger.done })
		soon(t, "write", func() {
			for range 100 {
				if _, err := g.out.Write(make([]byte, 64<<10)); err != nil && !errors.Is(err, syscall.EPIPE) {
					t.Errorf("write: %v", err)
					return
				}
			}
		})
		_ = g.out.Close()
		_ = g.err.Close()
		soon(t, "drain", func() { <-r.drained })
	})
}
