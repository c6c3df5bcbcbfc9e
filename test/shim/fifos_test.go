package shim

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// fifos are the streams of a process as containerd's clients make them.
type fifos struct {
	host                  *host
	stdin, stdout, stderr string // paths
	in                    *os.File

	mu   sync.Mutex
	got  map[string]*bytes.Buffer // guarded by mu
	news chan struct{}
	ends map[string]chan struct{}
}

// fifos makes them; reading begins with read.
func (h *host) fifos(name string, terminal bool) *fifos {
	h.Helper()
	dir := filepath.Join(h.dir, "f", name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		h.Fatal(err)
	}
	f := &fifos{
		host: h, stdin: filepath.Join(dir, "in"), stdout: filepath.Join(dir, "out"),
		got: map[string]*bytes.Buffer{}, news: make(chan struct{}, 1), ends: map[string]chan struct{}{},
	}
	paths := []string{f.stdin, f.stdout}
	if !terminal {
		f.stderr = filepath.Join(dir, "err")
		paths = append(paths, f.stderr)
	}
	for _, path := range paths {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			h.Fatal(err)
		}
	}
	return f
}

// read collects the outputs from now on.
func (f *fifos) read() *fifos {
	f.host.Helper()
	for _, path := range []string{f.stdout, f.stderr} {
		if path == "" {
			continue
		}
		f.got[path] = &bytes.Buffer{}
		f.ends[path] = make(chan struct{})
		go f.collect(path)
	}
	return f
}

func (f *fifos) collect(path string) {
	defer close(f.ends[path])
	file, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		return
	}
	defer file.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := file.Read(buf)
		f.mu.Lock()
		f.got[path].Write(buf[:n])
		f.mu.Unlock()
		select {
		case f.news <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

func (f *fifos) text(path string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.got[path].String()
}

// await waits until the text is in stdout.
func (f *fifos) await(text string) {
	f.host.Helper()
	timeout := time.After(patience)
	for !strings.Contains(f.text(f.stdout), text) {
		select {
		case <-f.news:
		case <-timeout:
			f.host.Fatalf("stdout %q, want %q in it; stderr %q", f.text(f.stdout), text, f.stderrText())
		}
	}
}

func (f *fifos) stderrText() string {
	if f.stderr == "" {
		return ""
	}
	return f.text(f.stderr)
}

// output waits for the end of stdout and returns all of it.
func (f *fifos) output() string {
	f.host.Helper()
	for _, end := range f.ends {
		select {
		case <-end:
		case <-time.After(patience):
			f.host.Fatalf("outputs do not end: %q %q", f.text(f.stdout), f.stderrText())
		}
	}
	return f.text(f.stdout)
}

// write writes to stdin.
func (f *fifos) write(text string) {
	f.host.Helper()
	if f.in == nil {
		in, err := os.OpenFile(f.stdin, os.O_WRONLY, 0)
		if err != nil {
			f.host.Fatal(err)
		}
		f.in = in
		f.host.Cleanup(func() { _ = in.Close() })
	}
	if _, err := io.WriteString(f.in, text); err != nil {
		f.host.Fatal(err)
	}
}

// detach closes stdin without its end being meant.
func (f *fifos) detach() {
	if f.in != nil {
		_ = f.in.Close()
		f.in = nil
	}
}
