package agent_test

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

var processRows = []row{
	{10, "Exec", "ExecProcess", "the process in the guest's /proc", proveExec, with[noExec]},
	{16, "SignalProcess", "SignalProcess, Extension.Signal", "the process' own handler; of all, every pid is gone", proveSignalProcess, with[noSignalProcess]},
	{17, "WinsizeProcess", "TtyWinResize", "stty size inside", proveWinsizeProcess, with[noWinsizeProcess]},
	{18, "WriteProcessStdin", "WriteStdin", "1 byte and 20 MiB arrive: sum of the file that the process made of them", proveWriteStdin, with[noWriteProcessStdin]},
	{19, "CloseProcessStdin", "CloseStdin", "cat has ended in the guest", proveCloseStdin, with[noCloseProcessStdin]},
	{20, "ReadProcessStdout", "ReadStdout", "CRC of 20 MiB equals the guest's, of a process that ends at once", proveReadStdout, with[noReadProcessStdout]},
	{21, "ReadProcessStderr", "ReadStderr", "CRC of 20 MiB equals the guest's, of a process that ends at once", proveReadStderr, with[noReadProcessStderr]},
	{23, "WaitProcess", "WaitProcess", "0, 1, 127, 137, and 143 of an exec; several waiters, late waiters; the process is gone from /proc", proveWaitProcess, with[noWaitProcess]},
	{60, "Streams", "a connection per stream (ours)", "bytes come back that a process in the guest turned round", proveStreams, with[noStreams]},
	{61, "ForgetProcess", "–", "the guest is asked again, and does not know the process", proveForgetProcess, with[noForgetProcess]},
}

const bulk = 20 * mib

// noise is 20 MiB that do not repeat.
func noise() []byte {
	b := make([]byte, bulk)
	_, _ = rand.NewChaCha8([32]byte{9}).Read(b)
	return b
}

// crc32 is that of a container's file, as the guest reads it.
func (e *env) crc32(id, name string) string {
	sum, _, _ := strings.Cut(e.look("crc32 "+rooted(id, name)), " ")
	return sum
}

func proveExec(e *env) {
	id := e.run("/bin/sleep", "1000")
	e.ok(e.Exec(e.ctx, &protocol.ExecProcessRequest{ContainerId: id, ExecId: "e", Process: process("/bin/sleep", "4711")}))
	e.sees(hasCommand(id, "/bin/sleep 4711"), "1")
}

func proveSignalProcess(e *env) {
	id := e.run("/bin/sh", "-c", "trap 'echo got it > /got' USR1; echo up > /up; while :; do usleep 10000; done")
	e.ok(e.Exec(e.ctx, &protocol.ExecProcessRequest{ContainerId: id, ExecId: "e", Process: process("/bin/sleep", "1000")}))
	e.sees("cat "+rooted(id, "up"), "up")
	e.ok(e.SignalProcess(e.ctx, id, "", uint32(unix.SIGUSR1), false))
	e.sees("cat "+rooted(id, "got"), "got it")
	e.ok(e.SignalProcess(e.ctx, id, "", uint32(unix.SIGKILL), true))
	e.until("every process is gone", func() bool { return len(e.pids(id)) == 0 })
}

func proveWinsizeProcess(e *env) {
	id := e.runWith(func(r *protocol.CreateContainerRequest) { r.OCI.Process.Terminal = true },
		"/bin/sh", "-c", "while :; do stty size > /new; busybox mv /new /size; usleep 20000; done")
	e.sees("test -e "+rooted(id, "size")+" && echo runs", "runs")
	e.ok(e.WinsizeProcess(e.ctx, id, "", 33, 77))
	e.sees("cat "+rooted(id, "size"), "33 77")
}

func proveWriteStdin(e *env) {
	data := noise()
	for _, size := range []int{1, bulk} {
		id := e.run("/bin/sh", "-c", "cat > /in")
		_, err := e.WriteProcessStdin(e.ctx, id, "", data[:size])
		e.ok(err)
		e.sees("wc -c < "+rooted(id, "in"), fmt.Sprint(size))
		e.equal("sum", e.crc32(id, "in"), fmt.Sprintf("%08x", crc32.ChecksumIEEE(data[:size])))
	}
}

func proveCloseStdin(e *env) {
	id := e.run("/bin/cat")
	e.until("it runs", func() bool { return e.look(hasCommand(id, "/bin/cat")+"; true") == "1" })
	e.ok(e.CloseProcessStdin(e.ctx, id, ""))
	e.until("it has ended", func() bool { return len(e.pids(id)) == 0 })
}

func proveReadStdout(e *env) { proveRead(e, "", e.ReadProcessStdout) }
func proveReadStderr(e *env) { proveRead(e, " >&2", e.ReadProcessStderr) }

type read = func(ctx context.Context, containerID, execID string, buf []byte) (int, error)

func proveRead(e *env, to string, read read) {
	id := e.create(nil, "/bin/sh", "-c", "exec cat /data"+to)
	e.ok(os.WriteFile(e.hostRooted(id, "data"), noise(), 0o644))
	e.ok(e.StartContainer(e.ctx, id))
	sum, n, buf := crc32.NewIEEE(), 0, make([]byte, mib)
	for {
		k, err := read(e.ctx, id, "", buf)
		n += k
		_, _ = sum.Write(buf[:k])
		if errors.Is(err, io.EOF) {
			break
		}
		e.ok(err)
	}
	e.equal("bytes", n, bulk)
	e.equal("sum", fmt.Sprintf("%08x", sum.Sum32()), e.crc32(id, "data"))
	e.until("it has ended", func() bool { return len(e.pids(id)) == 0 })
}

func proveWaitProcess(e *env) {
	id := e.run("/bin/sleep", "1000")
	exec := func(execID string, args ...string) {
		e.ok(e.Exec(e.ctx, &protocol.ExecProcessRequest{ContainerId: id, ExecId: execID, Process: process(args...)}))
	}
	wait := func(execID string, code int32) {
		exit, err := e.WaitProcess(e.ctx, id, execID)
		e.ok(err)
		e.equal("exit status of "+execID, exit.Code, code)
	}
	exec("zero", "/bin/sh", "-c", "exit 0")
	exec("one", "/bin/sh", "-c", "exit 1")
	exec("missing", "/bin/sh", "-c", "nosuchcommand")
	exec("term", "/bin/sleep", "1000")
	wait("zero", 0)
	wait("one", 1)
	wait("missing", 127)
	wait("one", 1) // late
	type answer struct {
		agent.ExitStatus
		err error
	}
	answers := make(chan answer, 3)
	for range cap(answers) {
		go func() {
			exit, err := e.WaitProcess(e.ctx, id, "term")
			answers <- answer{exit, err}
		}()
	}
	e.ok(e.SignalProcess(e.ctx, id, "term", uint32(unix.SIGTERM), false))
	for range cap(answers) {
		a := soon(e, "a waiter returns", answers)
		e.ok(a.err)
		e.equal("exit status", a.Code, int32(143))
	}
	e.equal("processes after the waits", len(e.pids(id)), 1)
	e.ok(e.SignalProcess(e.ctx, id, "", uint32(unix.SIGKILL), false))
	wait("", 137)
	e.equal("processes in the end", e.pids(id), []string{})
}

func proveStreams(e *env) {
	id := e.create(nil, "/bin/sh", "-c", "busybox rev; echo bad >&2")
	s, err := e.Streams(e.ctx, id, "", agent.StreamSet{Stdin: true, Stdout: true, Stderr: true})
	e.ok(err)
	e.undo.Add(s.Close)
	if s.Stdin == nil || s.Stdout == nil || s.Stderr == nil {
		e.fail("streams are missing: %+v", s)
	}
	e.ok(e.StartContainer(e.ctx, id))
	_, err = io.WriteString(s.Stdin, "drawer\n")
	e.ok(err)
	e.ok(s.Stdin.Close())
	out, err := io.ReadAll(s.Stdout)
	e.ok(err)
	bad, err := io.ReadAll(s.Stderr)
	e.ok(err)
	e.equal("output", string(out)+string(bad), "reward\nbad\n")
}

func proveForgetProcess(e *env) {
	id := e.run("/bin/sh", "-c", "exit 3")
	exit, err := e.WaitProcess(e.ctx, id, "")
	e.ok(err)
	e.equal("exit status", exit.Code, int32(3))
	e.ForgetProcess(id, "")
	_, err = e.WaitProcess(e.ctx, id, "")
	e.is("wait for a process that was forgotten", err, errdefs.ErrNotFound)
}
