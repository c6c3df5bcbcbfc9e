// Command observer shows the host what a guest looks like without asking the
// guest's agent. It runs in a container, listens on a vsock port, and runs
// scripts in the mount namespace of the guest's first process, by the busybox
// that it brought along. In all other namespaces a script is where the
// containers are: the network is the sandbox'.
//
//	observer PORT
//
// A connection is one script: {"script": …} in, {"output": …, "status": …,
// "time": …} out, where time is the guest's clock when the script came.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	fmt.Fprintln(os.Stderr, run(os.Args[1:]))
	os.Exit(1)
}

// run returns when it can't go on.
func run(args []string) error {
	port, err := strconv.ParseUint(args[0], 10, 32)
	if err != nil {
		return err
	}
	mounts, err := os.Open("/guest/proc/1/ns/mnt")
	if err != nil {
		return err
	}
	shell, err := os.Open("/bin/busybox")
	if err != nil {
		return err
	}
	// The net package wants /dev/vsock for this, which a container has not.
	l, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(l, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: uint32(port)}); err != nil {
		return err
	}
	if err := unix.Listen(l, 16); err != nil {
		return err
	}
	fmt.Println("listening")
	for { // until it is killed
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err != nil {
			return err
		}
		go func() {
			conn := os.NewFile(uintptr(fd), "vsock")
			defer conn.Close()
			if err := serve(conn, mounts, shell); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
	}
}

type answer struct {
	Output string    `json:"output"`
	Status int       `json:"status"`
	Time   time.Time `json:"time"`
}

func serve(conn, mounts, shell *os.File) error {
	var question struct {
		Script string `json:"script"`
	}
	if err := json.NewDecoder(conn).Decode(&question); err != nil {
		return err
	}
	a := answer{Time: time.Now()}
	runtime.LockOSThread() // for good: nobody else is to get it
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(int(mounts.Fd()), unix.CLONE_NEWNS); err != nil {
		return err
	}
	// Not by its name, which means nothing in the guest.
	cmd := &exec.Cmd{
		Path: fmt.Sprintf("/proc/self/fd/%d", shell.Fd()),
		Args: []string{"sh", "-c", question.Script},
		Env:  []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Dir:  "/",
	}
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return err
	}
	a.Output, a.Status = string(out), cmd.ProcessState.ExitCode()
	return json.NewEncoder(conn).Encode(a)
}
