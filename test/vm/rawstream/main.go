// Command rawstream moves bytes for tests inside a guest: between its standard
// streams and memory, or between a vsock port and memory, so that the one can
// be measured against the other.
//
//	rawstream write COUNT        zeros to stdout
//	rawstream read               stdin to its end; says how many bytes that was
//	rawstream listen PORT COUNT  zeros to the first connection; reads as many from the second, and answers
package main

import (
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// packet is the largest write that every vsock device carries; see internal/guest.
const packet = 32 << 10

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	numbers := make([]int64, 2)
	for i, arg := range args[1:] {
		n, err := strconv.ParseInt(arg, 10, 64)
		if err != nil {
			return err
		}
		numbers[i] = n
	}
	switch args[0] {
	case "write":
		return write(os.Stdout, numbers[0], 64<<10)
	case "read":
		n, err := read(os.Stdin)
		fmt.Println(n)
		return err
	}
	return serve(uint32(numbers[0]), numbers[1])
}

// serve knows no net package: that wants /dev/vsock, which a container has not.
func serve(port uint32, n int64) error {
	l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}); err != nil {
		return err
	}
	if err := unix.Listen(l, 1); err != nil {
		return err
	}
	fmt.Println("listening")
	conn, err := accept(l)
	if err != nil {
		return err
	}
	if err := write(conn, n, packet); err != nil {
		return err
	}
	if conn, err = accept(l); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	for n > 0 {
		k, err := conn.Read(buf)
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	_, err = conn.Write([]byte{1})
	return err
}

func accept(l int) (*os.File, error) {
	fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "vsock"), nil
}

func write(w io.Writer, n int64, size int) error {
	buf := make([]byte, size)
	for n > 0 {
		k, err := w.Write(buf[:min(n, int64(size))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

func read(r io.Reader) (n int64, err error) {
	return io.CopyBuffer(io.Discard, struct{ io.Reader }{r}, make([]byte, 64<<10))
}
