package shim

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
)

const bulk = 20 << 20

func (t *tasks) closeIO(execID string) {
	t.Helper()
	if _, err := t.CloseIO(t.ctx(), &taskapi.CloseIORequest{ID: t.id, ExecID: execID, Stdin: true}); err != nil {
		t.Fatal(err)
	}
}

// 20 MiB in and out at the same time, byte for byte.
func TestShimBulk(t *testing.T) {
	h := newHost(t)
	c := h.bundle("bulk", "cat")
	c.io = h.fifos("bulk", false).read()
	c.run()
	sent := sha256.New()
	begin := time.Now()
	chunk := make([]byte, 64<<10)
	for i := range bulk / len(chunk) {
		for j := range chunk {
			chunk[j] = byte(i + j*7 + j>>8)
		}
		sent.Write(chunk)
		c.io.write(string(chunk))
	}
	c.closeIO("") // with the writer still there, and much on its way
	if code := c.wait(""); code != 0 {
		t.Errorf("exit code %d", code)
	}
	out := c.io.output()
	t.Logf("20 MiB both ways in %v", time.Since(begin))
	got := sha256.Sum256([]byte(out))
	if len(out) != bulk || !bytes.Equal(got[:], sent.Sum(nil)) {
		t.Errorf("%d bytes came back of %d, or they differ", len(out), bulk)
	}
	h.sink.want(t, "exit bulk bulk 0")
	c.delete()
}

// A reader that is so slow that the process is long gone, and Delete on its
// way, gets everything.
func TestShimSlowReader(t *testing.T) {
	const size = 3 << 20
	h := newHost(t)
	c := h.bundle("slow", "sh", "-c", fmt.Sprintf("head -c %d /dev/zero", size))
	c.io = h.fifos("slow", false)
	c.run()
	f, err := os.Open(c.io.stdout)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	errs, err := os.Open(c.io.stderr)
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	// Slow up to here: the process ends with its last bytes in the buffers.
	n, err := io.CopyN(io.Discard, f, size-200<<10)
	if err != nil {
		t.Fatal(err)
	}
	if code := c.wait(""); code != 0 {
		t.Errorf("exit code %d", code)
	}
	h.sink.want(t, "exit slow slow 0")
	deleted := make(chan struct{})
	go func() {
		defer close(deleted)
		c.delete()
	}()
	time.Sleep(2 * time.Second)
	rest, err := io.Copy(io.Discard, f)
	if n += rest; err != nil || n != size {
		t.Errorf("%d bytes of %d, %v", n, size, err)
	}
	<-deleted
}

// A process that writes and is gone has said everything, and a reader that
// comes after its exit gets it.
func TestShimLateReader(t *testing.T) {
	h := newHost(t)
	c := h.bundle("late", "sh", "-c", "echo out; echo err >&2")
	c.io = h.fifos("late", false)
	c.run()
	if code := c.wait(""); code != 0 {
		t.Errorf("exit code %d", code)
	}
	h.sink.want(t, "exit late late 0")
	c.io.read()
	if out := c.io.output(); out != "out\n" || c.io.stderrText() != "err\n" {
		t.Errorf("output %q, %q", out, c.io.stderrText())
	}
	c.delete()

	d := h.bundle("short", "sleep", "1000").run()
	for i := range 20 {
		id := fmt.Sprint("e", i)
		f := h.fifos(id, false).read()
		d.exec(id, f, nil, "echo", "at", "once")
		d.wait(id)
		h.sink.want(t, "exit short "+id+" 0")
		if out := f.output(); out != "at once\n" {
			t.Errorf("output %q", out)
		}
		d.deleteExec(id)
	}
	d.end()
}

// Clients come and go; the process sees one stdin, and its end at CloseIO only.
func TestShimReattach(t *testing.T) {
	h := newHost(t)
	c := h.bundle("again", "sh", "-c", "while read line; do echo got $line; done; echo end")
	c.io = h.fifos("again", false).read()
	c.run()
	for _, line := range []string{"one", "two", "three"} {
		c.io.write(line + "\n")
		c.io.await("got " + line + "\n")
		c.io.detach()
	}
	time.Sleep(200 * time.Millisecond)
	if strings.Contains(c.io.text(c.io.stdout), "end") {
		t.Error("a client that left was the end of input")
	}
	c.io.write("four\n")
	c.closeIO("")
	if code := c.wait(""); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if out := c.io.output(); !strings.HasSuffix(out, "got four\nend\n") {
		t.Errorf("output %q", out)
	}
	h.sink.want(t, "exit again again 0")
	c.delete()
}

// Without streams a process reads the end of its input and writes to nobody.
func TestShimNoStreams(t *testing.T) {
	h := newHost(t)
	c := h.bundle("mute", "sh", "-c", "cat && head -c 1000000 /dev/zero && exit 9").start()
	if _, err := c.Create(c.ctx(), c.createRequest()); err != nil {
		t.Fatal(err)
	}
	h.sink.want(t, "create mute")
	c.startTask()
	if code := c.wait(""); code != 9 {
		t.Errorf("exit code %d, want 9", code)
	}
	h.sink.want(t, "exit mute mute 9")
	c.delete()
}

// Outputs to a file and to a logger.
func TestShimLogs(t *testing.T) {
	h := newHost(t)
	c := h.bundle("file", "sh", "-c", "echo out; echo err >&2")
	path := filepath.Join(h.dir, "logs", "file")
	c.io = &fifos{host: h, stdout: "file://" + path}
	c.run()
	c.wait("")
	h.sink.want(t, "exit file file 0")
	c.delete()
	text, err := os.ReadFile(path)
	if err != nil || len(text) != 8 || !strings.Contains(string(text), "out\n") || !strings.Contains(string(text), "err\n") {
		t.Errorf("file has %q, %v", text, err)
	}

	// The logger is told by its environment and by arguments of the URI.
	script := filepath.Join(h.dir, "logger")
	err = os.WriteFile(script, []byte("#!/bin/sh\nexec 5>&-\n/bin/busybox cat <&3 >$2/out\n/bin/busybox cat <&4 >$2/err\necho $CONTAINER_NAMESPACE $CONTAINER_ID >$2/env\n"), 0o700)
	if err != nil {
		t.Fatal(err)
	}
	d := h.bundle("logger", "sh", "-c", "echo out; echo err >&2")
	d.io = &fifos{host: h, stdout: "binary://" + script + "?dir=" + h.dir}
	d.run()
	d.wait("")
	h.sink.want(t, "exit logger logger 0")
	d.delete()
	for name, want := range map[string]string{"out": "out\n", "err": "err\n", "env": "ns logger\n"} {
		if got, err := os.ReadFile(filepath.Join(h.dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}
