package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This program runs in the container too, bind-mounted: as the other end of
// what is measured.

const (
	guestCommand = "in-guest"
	guestPort    = 5005
	volume       = 20 << 20 // bytes that a stream carries
)

// source writes the volume to stdout, sink says that it runs, reads stdin to its
// end and says how much it was: as programs in C, which have no runtime that takes
// time of its own.
var (
	source = []string{"/bin/dd", "if=/dev/zero", "bs=32k", "count=" + strconv.Itoa(volume>>15)}
	sink   = []string{"/bin/sh", "-c", "echo ready; exec dd bs=64k iflag=fullblock of=/dev/null 2>&1"}
)

// What the program does in the guest.
const (
	actNet = "net" // connects to an address and does what it is told there
	actRaw = "raw" // serves raw vsock connections: 'r' is answered by the volume, 'w' is followed by it
)

func guestMain(args []string) int {
	// With one P Go's runtime takes it from every system call of more than 20 µs,
	// which would be what is measured here.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	var err error
	switch args[0] {
	case actNet:
		err = obey(args[1])
	case actRaw:
		err = serveRaw()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// A plainFile is read and written as a C program does it: by system calls that
// block, of which Go's runtime knows nothing. Its scheduler and monitor would
// take half of an emulated guest's time, and the streams would be compared with that.
type plainFile int

func (f plainFile) Read(p []byte) (int, error) {
	n, err := f.call(unix.SYS_READ, p)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (f plainFile) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = f.call(unix.SYS_WRITE, p[n:])
		n += m
	}
	return n, err
}

func (f plainFile) Close() error { return unix.Close(int(f)) }

func (f plainFile) call(number uintptr, p []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(number, uintptr(f), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR: // the runtime asks for the thread
		default:
			return 0, errno
		}
	}
}

// pour writes the volume, in pieces that vhost-device-vsock can read: it drops
// packets that the guest's kernel made of several pieces of memory.
func pour(w io.Writer) error {
	chunk := make([]byte, 32<<10)
	for range volume / len(chunk) {
		if _, err := w.Write(chunk); err != nil {
			return err
		}
	}
	return nil
}

func serveRaw() error {
	l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: guestPort}), unix.Listen(l, 1)); err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		conn, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err != nil {
			return err
		}
		if err := answerRaw(plainFile(conn)); err != nil {
			return err
		}
	}
}

func answerRaw(conn io.ReadWriteCloser) error {
	what := make([]byte, 1)
	if _, err := io.ReadFull(conn, what); err != nil {
		return err
	}
	var err error
	if what[0] == 'r' {
		err = pour(conn)
	} else {
		buf := make([]byte, 64<<10)
		for n := 0; err == nil && n < volume; {
			var m int
			m, err = conn.Read(buf)
			n += m
		}
	}
	// One byte each way at the end: it has arrived, and nobody hangs up early.
	if err == nil {
		_, err = conn.Write([]byte{'.'})
	}
	if err == nil {
		_, err = conn.Read(what)
		if errors.Is(err, io.EOF) {
			err = nil
		}
	}
	return errors.Join(err, conn.Close())
}
