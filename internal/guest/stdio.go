package guest

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"
)

// stdio is the standard streams of one process as the agent has them. Those that
// do not exist are nil.
type stdio struct {
	in       *input
	out, err *output
	console  *os.File // the terminal's master, for its size

	socket *os.File   // where the terminal will come from
	theirs []*os.File // the process' ends, open until it has started
}

type stdioOptions struct {
	terminal bool
	noStdin  bool // the process starts with its stdin at the end
	pipeSize int  // 0: defaultPipeSize
	uid, gid int  // who must be able to open /dev/stdout again
}

// defaultPipeSize is sixteen times the kernel's, and its limit for who has no
// privileges (pipe-max-size): a process and the agent take turns less often.
const defaultPipeSize = bulkBuffer

// newStdio makes the streams and gives their other ends to the process, which
// may have a terminal only after it has started.
func newStdio(p *libcontainer.Process, o stdioOptions) (_ *stdio, err error) {
	s := &stdio{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if o.terminal {
		ours, theirs, err := socketPair()
		if err != nil {
			return nil, fmt.Errorf("make console socket: %w", err)
		}
		s.socket, s.theirs, p.ConsoleSocket = ours, []*os.File{theirs}, theirs
		return s, nil
	}
	if !o.noStdin {
		w, r, err := s.pipe(o, true)
		if err != nil {
			return nil, err
		}
		s.in, p.Stdin = newInput(w, false), r
	}
	r, w, err := s.pipe(o, false)
	if err != nil {
		return nil, err
	}
	s.out, p.Stdout = newOutput(r), w
	if r, w, err = s.pipe(o, false); err != nil {
		return nil, err
	}
	s.err, p.Stderr = newOutput(r), w
	return s, nil
}

// pipe returns the agent's end, which does not block, and the process' own.
func (s *stdio) pipe(o stdioOptions, write bool) (ours *patient, theirs *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make pipe: %w", err)
	}
	our, their := fds[0], fds[1]
	if write {
		our, their = their, our
	}
	_, _ = unix.FcntlInt(uintptr(our), unix.F_SETPIPE_SZ, cmp.Or(o.pipeSize, defaultPipeSize))
	if o.uid != 0 || o.gid != 0 {
		_ = unix.Fchown(our, o.uid, o.gid)
	}
	theirs = os.NewFile(uintptr(their), "pipe")
	s.theirs = append(s.theirs, theirs)
	ours, err = newPatient(our, "pipe")
	return ours, theirs, err
}

// started takes the terminal that the process has sent, and closes the process' ends.
func (s *stdio) started(o stdioOptions) (err error) {
	defer s.closeTheirs()
	if s.socket == nil {
		return nil
	}
	if s.console, err = receiveFile(s.socket); err != nil {
		return fmt.Errorf("receive console: %w", err)
	}
	out, err := dup(s.console)
	if err != nil {
		return err
	}
	s.out = newOutput(out)
	if o.noStdin {
		return nil
	}
	in, err := dup(s.console)
	if err != nil {
		return err
	}
	s.in = newInput(in, true)
	return nil
}

func (s *stdio) resize(rows, columns uint16) error {
	if s.console == nil {
		return precondition("the process has no terminal")
	}
	conn, err := s.console.SyscallConn()
	if err != nil {
		return err
	}
	var ioctlErr error
	err = conn.Control(func(fd uintptr) {
		ioctlErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
	})
	return errors.Join(err, ioctlErr)
}

func (s *stdio) closeTheirs() {
	for _, f := range s.theirs {
		f.Close()
	}
	s.theirs = nil
	if s.socket != nil {
		s.socket.Close()
		s.socket = nil
	}
}

// close ends all streams, read or not.
func (s *stdio) close() {
	s.closeTheirs()
	s.in.close()
	s.out.close()
	s.err.close()
	if s.console != nil {
		s.console.Close()
	}
}

// maxLastWords bounds what is told of a process that was not to be.
const maxLastWords = 256

// lastWords is the first line on the stderr of a process that libcontainer could
// not start. Its first steps have another way for their errors; but when Go's
// runtime ends them, which too small a limit of pids makes it do, it says why
// there, and libcontainer knows only that they were not ready.
func (s *stdio) lastWords() string {
	if s.err == nil {
		return ""
	}
	conn, err := s.err.file.SyscallConn()
	if err != nil {
		return ""
	}
	buf, n := make([]byte, maxLastWords), 0
	_ = conn.Control(func(fd uintptr) { n, _ = unix.Read(int(fd), buf) }) // does not block
	line, _, _ := strings.Cut(string(buf[:max(n, 0)]), "\n")
	if line == "" {
		return ""
	}
	return fmt.Sprintf("; its last words: %q", line)
}

func socketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "console"), os.NewFile(uintptr(fds[1]), "console"), nil
}

// receiveFile takes one file from a socket that already has it.
func receiveFile(socket *os.File) (*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	var name [4096]byte
	_, n, _, _, err := unix.Recvmsg(int(socket.Fd()), name[:], oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, err
	}
	if len(msgs) != 1 {
		return nil, fmt.Errorf("%d control messages, want 1", len(msgs))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		return nil, fmt.Errorf("%d files, want 1", len(fds))
	}
	return os.NewFile(uintptr(fds[0]), "console"), nil
}

// dup makes a file that does not block. All copies of a terminal share the flag.
func dup(f *os.File) (*patient, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("dup console: %w", err)
	}
	return newPatient(fd, f.Name())
}
