package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// This program runs in the container too, bind-mounted: as the other end of
// what is measured.

const (
	guestCommand = "in-guest"
	guestPort    = 5005
	volume       = 20 << 20 // bytes that a stream carries
)

// source writes the volume to stdout; sink says that it runs, reads stdin to its
// end or as often as it is told, and says how much it was: programs in C, which
// have no runtime that takes time of its own.
var (
	source = []string{"/bin/dd", "if=/dev/zero", "bs=32k", "count=" + strconv.Itoa(volume>>15)}
	sink   = []string{"/bin/sh", "-c", "echo ready; exec dd bs=64k iflag=fullblock of=/dev/null status=noxfer $1 2>&1", "sink"}
)

const (
	sinkReads = volume >> 16 // times of 64 KiB
	sinkReady = "ready\n"
	sinkEnds  = "%[1]d+0 records in\n%[1]d+0 records out\n"
)

// What the program does in the guest.
const (
	actNet = "net" // connects to an address and does what it is told there
	actRaw = "raw" // serves raw vsock connections: runs the source or the sink with one
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

// What a raw connection begins with.
const (
	rawSource = 'r'
	rawSink   = 'w'
)

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
		if err := answerRaw(os.NewFile(uintptr(conn), "connection")); err != nil {
			return err
		}
	}
}

// answerRaw has a process read and write the connection itself.
func answerRaw(conn *os.File) error {
	what := make([]byte, 1)
	if _, err := io.ReadFull(conn, what); err != nil {
		return err
	}
	args := source
	if what[0] == rawSink { // a connection that is closed one way only is closed both ways by some hosts
		args = append(slices.Clip(sink), fmt.Sprintf("count=%d", sinkReads))
	}
	cmd := exec.Command(args[0], args[1:]...) //nolint:noctx // ends with its connection
	cmd.Stdin, cmd.Stdout = conn, conn
	err := cmd.Run()
	if err == nil { // who hangs up first may lose what is on its way
		_, _ = conn.Read(what)
	}
	return errors.Join(err, conn.Close())
}
