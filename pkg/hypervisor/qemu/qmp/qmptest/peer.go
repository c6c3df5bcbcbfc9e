// Package qmptest plays QEMU's side of a QMP connection from a script, for
// tests of what speaks QMP.
package qmptest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A Step is one line of a script.
type Step func(*peer) error

type peer struct {
	conn  *net.UnixConn
	lines *bufio.Reader
	id    json.RawMessage // of the command expected last
	files []*os.File      // that came with commands and were not taken
}

// Serve plays the script on a connection of its own and returns the other end.
// After the last step it reads until the client closes. A script that goes
// wrong fails the test.
func Serve(tb testing.TB, script ...Step) *net.UnixConn {
	tb.Helper()
	near, far := Pair(tb)
	played := make(chan struct{})
	go func() {
		defer close(played)
		if err := Play(far, script...); err != nil {
			tb.Errorf("qmp peer: %v", err)
		}
	}()
	tb.Cleanup(func() {
		near.Close()
		<-played
	})
	return near
}

// Pair is a connected pair of sockets.
func Pair(tb testing.TB) (a, b *net.UnixConn) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "qmp")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			tb.Fatal(err)
		}
		conns[i] = conn.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// Play plays the script and closes the connection.
func Play(conn *net.UnixConn, script ...Step) error {
	p := &peer{conn: conn}
	p.lines = bufio.NewReader(p)
	defer func() {
		conn.Close()
		for _, f := range p.files {
			f.Close()
		}
	}()
	for i, step := range script {
		if err := step(p); errors.Is(err, errClose) {
			return nil
		} else if err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	_, err := io.Copy(io.Discard, p.lines)
	if errors.Is(err, unix.ECONNRESET) { // closed with an answer unread
		return nil
	}
	return err
}

// Read keeps the files that come with the bytes.
func (p *peer) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := p.conn.ReadMsgUnix(b, oob)
	if errors.Is(err, io.EOF) {
		return n, io.EOF // bare, as readers want it
	}
	if err != nil {
		return n, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return n, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return n, err
		}
		for _, fd := range fds {
			p.files = append(p.files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return n, nil
}

func (p *peer) send(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = p.conn.Write(append(line, '\r', '\n'))
	return err
}

var errClose = errors.New("close")

// Greet sends the greeting of a QEMU of this version.
func Greet(major, minor, micro int) Step {
	return func(p *peer) error {
		version := map[string]any{"qemu": map[string]int{"major": major, "minor": minor, "micro": micro}, "package": ""}
		return p.send(map[string]any{"QMP": map[string]any{"version": version, "capabilities": []string{"oob"}}})
	}
}

// Hello greets as QEMU 7.2.22 and negotiates.
func Hello() Step {
	return Steps(Greet(7, 2, 22), Expect("qmp_capabilities"), Return(nil))
}

// Steps are several as one.
func Steps(steps ...Step) Step {
	return func(p *peer) error {
		for _, step := range steps {
			if err := step(p); err != nil {
				return err
			}
		}
		return nil
	}
}

// Expect reads a command and insists on its name. The last of args, if any, is
// the JSON that its arguments must equal.
func Expect(command string, args ...string) Step {
	return func(p *peer) error {
		line, err := p.lines.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("expect %s: %w", command, err)
		}
		var got struct {
			Execute   string          `json:"execute"`
			Arguments json.RawMessage `json:"arguments"`
			ID        json.RawMessage `json:"id"`
		}
		if err := json.Unmarshal(line, &got); err != nil {
			return fmt.Errorf("expect %s: %q: %w", command, line, err)
		}
		if got.Execute != command {
			return fmt.Errorf("expect %s: got %q", command, line)
		}
		for _, want := range args {
			if !bytes.Equal(got.Arguments, []byte(want)) {
				return fmt.Errorf("expect %s: arguments %s, want %s", command, got.Arguments, want)
			}
		}
		p.id = got.ID
		return nil
	}
}

// TakeFile insists on a file that came with a command and hands it to f,
// which owns it.
func TakeFile(f func(*os.File)) Step {
	return func(p *peer) error {
		if len(p.files) == 0 {
			return errors.New("no file came")
		}
		f(p.files[0])
		p.files = p.files[1:]
		return nil
	}
}

// Return answers the command expected last; nil stands for the empty object.
func Return(v any) Step {
	return func(p *peer) error {
		if v == nil {
			v = struct{}{}
		}
		return p.send(map[string]any{"return": v, "id": p.id})
	}
}

// Fail refuses the command expected last.
func Fail(class, desc string) Step {
	return func(p *peer) error {
		return p.send(map[string]any{"error": map[string]string{"class": class, "desc": desc}, "id": p.id})
	}
}

// Event tells an event; data may be nil.
func Event(name string, data any) Step {
	return func(p *peer) error {
		event := map[string]any{"event": name, "timestamp": map[string]int64{"seconds": 1700000000, "microseconds": 5}}
		if data != nil {
			event["data"] = data
		}
		return p.send(event)
	}
}

// Raw sends bytes as they are.
func Raw(s string) Step {
	return func(p *peer) error {
		_, err := io.WriteString(p.conn, s)
		return err
	}
}

// Do calls f, for what a script has to do besides.
func Do(f func()) Step {
	return func(*peer) error {
		f()
		return nil
	}
}

// Wait holds the script until the channel is closed.
func Wait(c <-chan struct{}) Step { return Do(func() { <-c }) }

// Close ends the script and the connection.
func Close() Step { return func(*peer) error { return errClose } }
