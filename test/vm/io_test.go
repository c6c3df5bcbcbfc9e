package vm

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const mib = 1 << 20

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

func testTerminal(t *testing.T, m *machine) {
	m.create("tty", func(r *protocol.CreateContainerRequest) {
		r.OCI.Process.Terminal = true
		r.OCI.Process.ConsoleSize = &protocol.Box{Height: 33, Width: 77}
	}, "/bin/sh", "-c", "stty size; read x; stty size; echo got $x; ls -l /proc/self/fd/1; exit 4")
	out := &extension.ChunkReader{R: m.stream("tty", "tty", extension.Stdout)}
	in := m.stream("tty", "tty", extension.Stdin)
	m.startContainer("tty")
	first := make([]byte, 64)
	n, err := out.Read(first)
	if err != nil || strings.TrimSpace(string(first[:n])) != "33 77" {
		t.Errorf("size: %q, %v", first[:n], err)
	}
	if _, err := m.agent.TtyWinResize(m.ctx(), &protocol.TtyWinResizeRequest{ContainerId: "tty", ExecId: "tty", Row: 50, Column: 100}); err != nil {
		t.Fatal(err)
	}
	if err := writeChunks(in, []byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(out)
	if err != nil || !strings.Contains(string(rest), "50 100") || !strings.Contains(string(rest), "got hello") || !strings.Contains(string(rest), "/dev/pts/0") {
		t.Errorf("then: %q, %v", rest, err)
	}
	if got := m.wait("tty", "tty").GetStatus(); got != 4 {
		t.Errorf("status %d", got)
	}
	in.Close()
	m.remove("tty")

	// An exec with a terminal, in a container without one.
	m.create("tty", nil, "/bin/sleep", "1000")
	m.startContainer("tty")
	req := &protocol.ExecProcessRequest{ContainerId: "tty", ExecId: "e", Process: process("/bin/stty", "size")}
	req.Process.Terminal = true
	req.Process.ConsoleSize = &protocol.Box{Height: 5, Width: 6}
	if _, err := m.agent.ExecProcess(m.ctx(), req); err != nil {
		t.Fatal(err)
	}
	if got := output(t, m.stream("tty", "e", extension.Stdout)); got != "5 6\r\n" {
		t.Errorf("exec: %q", got)
	}
	m.wait("tty", "e")
	m.remove("tty")
}

func testStreams(t *testing.T, m *machine) {
	data := random(20 * mib)
	sum := fmt.Sprintf("%x", md5.Sum(data))

	t.Run("stdin", func(t *testing.T) {
		m := m.on(t)
		m.create("io", nil, "/bin/md5sum")
		in, out := m.stream("io", "io", extension.Stdin), m.stream("io", "io", extension.Stdout)
		m.startContainer("io")
		start := time.Now()
		if err := writeChunks(in, data); err != nil {
			t.Fatal(err)
		}
		if err := extension.WriteEnd(in); err != nil {
			t.Fatal(err)
		}
		if receipts, err := io.ReadAll(in); err != nil || len(receipts)%4 != 0 {
			t.Errorf("after the end: %d bytes, %v", len(receipts), err)
		}
		t.Logf("20 MiB in %v", time.Since(start))
		if got := output(t, out); !strings.HasPrefix(got, sum) {
			t.Errorf("got %q, want %s", got, sum)
		}
		m.wait("io", "io")
		m.remove("io")
	})
	t.Run("stdout", func(t *testing.T) {
		m := m.on(t)
		m.create("io", nil, "/bin/sh", "-c", "head -c 20971520 /dev/zero | tee /dev/stderr")
		m.remove("io")
		m.create("io", nil, "/bin/head", "-c", "20971520", "/dev/zero")
		out := m.stream("io", "io", extension.Stdout)
		m.startContainer("io")
		start := time.Now()
		if got := output(t, out); got != string(make([]byte, 20*mib)) {
			t.Errorf("got %d bytes", len(got))
		}
		t.Logf("20 MiB in %v", time.Since(start))
		m.wait("io", "io")
		m.remove("io")
	})
	t.Run("both ways", func(t *testing.T) {
		m := m.on(t)
		m.create("io", nil, "/bin/cat")
		in, out := m.stream("io", "io", extension.Stdin), m.stream("io", "io", extension.Stdout)
		m.startContainer("io")
		go func() {
			_ = writeChunks(in, data)
			_ = extension.WriteEnd(in)
		}()
		if got := output(t, out); got != string(data) {
			t.Errorf("got %d bytes, want %d", len(got), len(data))
		}
		m.wait("io", "io")
		m.remove("io")
	})
	t.Run("a process that exits at once", func(t *testing.T) {
		m := m.on(t)
		for i := range 10 {
			m.create("io", nil, "/bin/sh", "-c", "head -c 50000 /dev/zero; exit 3")
			m.startContainer("io")
			if i%2 == 0 { // even when nobody listens before it has gone
				m.eventually("exit", func() bool { return len(m.pids("io")) == 0 })
			}
			out := m.stream("io", "io", extension.Stdout)
			if got := output(t, out); len(got) != 50000 {
				t.Errorf("got %d bytes", len(got))
			}
			if got := m.wait("io", "io").GetStatus(); got != 3 {
				t.Errorf("status %d", got)
			}
			m.remove("io")
		}
	})
	t.Run("wait before the output is read", func(t *testing.T) {
		m := m.on(t)
		m.create("io", nil, "/bin/sh", "-c", "head -c 60000 /dev/zero")
		out := m.stream("io", "io", extension.Stdout)
		m.startContainer("io")
		m.wait("io", "io")
		if got := output(t, out); len(got) != 60000 {
			t.Errorf("got %d bytes", len(got))
		}
		m.remove("io")
	})
	t.Run("taken, cut and taken again", func(t *testing.T) {
		m := m.on(t)
		m.create("io", nil, "/bin/cat")
		m.startContainer("io")
		in, out := m.stream("io", "io", extension.Stdin), m.stream("io", "io", extension.Stdout)
		if _, err := m.tryStream("io", "io", extension.Stdout); err == nil || !strings.Contains(err.Error(), fmt.Sprint("status ", extension.StreamTaken)) {
			t.Errorf("second reader: %v", err)
		}
		if err := writeChunks(in, []byte("one")); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 3)
		if _, err := io.ReadFull(&extension.ChunkReader{R: out}, buf); err != nil || string(buf) != "one" {
			t.Errorf("got %q, %v", buf, err)
		}
		in.Close()
		out.Close()
		m.eventually("stdin is free", func() bool {
			c, err := m.tryStream("io", "io", extension.Stdin)
			in = c
			return err == nil
		})
		m.eventually("stdout is free", func() bool {
			c, err := m.tryStream("io", "io", extension.Stdout)
			out = c
			return err == nil
		})
		if err := writeChunks(in, []byte("two")); err != nil {
			t.Fatal(err)
		}
		if err := extension.WriteEnd(in); err != nil {
			t.Fatal(err)
		}
		if got := output(t, out); got != "two" {
			t.Errorf("got %q", got)
		}
		m.wait("io", "io")
		m.remove("io")
	})
	t.Run("no stdin", func(t *testing.T) {
		m := m.on(t)
		out, _, status := m.run("io", func(r *protocol.CreateContainerRequest) { r.NoStdin = true }, "/bin/sh", "-c", "cat; echo end")
		if out != "end\n" || status != 0 {
			t.Errorf("got %q, %d", out, status)
		}
	})
	t.Run("a stream nobody takes does not keep the container", func(t *testing.T) {
		m := m.on(t)
		m.create("io", nil, "/bin/yes")
		m.startContainer("io")
		out := m.stream("io", "io", extension.Stdout)
		m.remove("io")
		if _, err := io.Copy(io.Discard, out); err != nil {
			t.Log(err)
		}
		out.Close()
	})
	t.Run("refused", func(t *testing.T) {
		m := m.on(t)
		for _, h := range []extension.StreamHeader{{ContainerID: "none", ExecID: "none"}, {ContainerID: "", ExecID: ""}} {
			if _, err := m.tryStream(h.ContainerID, h.ExecID, 1); err == nil || !strings.Contains(err.Error(), fmt.Sprint("status ", extension.StreamNotFound)) {
				t.Errorf("%+v: %v", h, err)
			}
		}
		conn, err := m.Dial(m.ctx(), extension.StreamPort)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
		if status, _, err := extension.ReadStreamAnswer(conn); err != nil || status != extension.StreamInvalid {
			t.Errorf("garbage: %d, %v", status, err)
		}
	})
}

func testPlainStreams(t *testing.T, m *machine) {
	m.create("plain", nil, "/bin/sh", "-c", "cat; echo done >&2")
	m.startContainer("plain")
	data := random(3 * mib)
	go func() {
		for b := data; len(b) > 0; {
			resp, err := m.agent.WriteStdin(m.ctx(), &protocol.WriteStreamRequest{ContainerId: "plain", ExecId: "plain", Data: b[:min(len(b), 100000)]})
			if err != nil {
				t.Error(err)
				return
			}
			b = b[resp.GetLen():]
		}
		if _, err := m.agent.WriteStdin(m.ctx(), &protocol.WriteStreamRequest{ContainerId: "plain", ExecId: "plain"}); err != nil {
			t.Error(err)
		}
	}()
	read := func(f func() (*protocol.ReadStreamResponse, error)) []byte {
		var all []byte
		for {
			resp, err := f()
			if err != nil {
				t.Fatal(err)
			}
			if len(resp.GetData()) == 0 {
				return all
			}
			all = append(all, resp.GetData()...)
		}
	}
	out := read(func() (*protocol.ReadStreamResponse, error) {
		return m.agent.ReadStdout(m.ctx(), &protocol.ReadStreamRequest{ContainerId: "plain", ExecId: "plain", Len: 32768})
	})
	if !bytes.Equal(out, data) {
		t.Errorf("got %d bytes, want %d", len(out), len(data))
	}
	errs := read(func() (*protocol.ReadStreamResponse, error) {
		return m.agent.ReadStderr(m.ctx(), &protocol.ReadStreamRequest{ContainerId: "plain", ExecId: "plain", Len: 32768})
	})
	if string(errs) != "done\n" {
		t.Errorf("stderr %q", errs)
	}
	m.wait("plain", "plain")
	m.remove("plain")
}
