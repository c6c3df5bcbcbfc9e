package qemu

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp/qmptest"
)

// The test binary stands in for the programs that a machine is made of, when
// the environment says how each is to behave. What it speaks is real: sockets,
// descriptors, exit codes, signals.
const (
	fakeQEMU      = "FAKE_QEMU"
	fakeVsock     = "FAKE_VSOCK"
	fakeVirtiofsd = "FAKE_VIRTIOFSD"
)

func TestMain(m *testing.M) {
	args := strings.Join(os.Args[1:], " ")
	for _, fake := range []struct {
		env, sign string
		run       func(behaviour string, args []string) int
	}{
		{fakeQEMU, "-sandbox on", runFakeQEMU},
		{fakeVsock, "--guest-cid", runFakeVsock},
		{fakeVirtiofsd, "-o announce_submounts", runFakeVirtiofsd},
	} {
		if behaviour, ok := os.LookupEnv(fake.env); ok && strings.Contains(args, fake.sign) {
			os.Exit(fake.run(behaviour, os.Args[1:]))
		}
	}
	os.Exit(leakless(m))
}

func fail(format string, args ...any) int {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	return 1
}

// number is what the pattern captures in the arguments.
func number(args []string, pattern string) int {
	m := regexp.MustCompile(pattern).FindStringSubmatch(strings.Join(args, " "))
	if m == nil {
		return -1
	}
	n, _ := strconv.Atoi(m[1])
	return n
}

func inherited(fd int) *os.File { return os.NewFile(uintptr(fd), "inherited") }

// runFakeQEMU behaves as told:
//
//	serve            answer every command, power off when asked to by ACPI
//	deaf             as serve, but do not power off
//	ring             as serve, and let the guest ring (through fakeVsock)
//	old              as serve, and know nothing of virtio devices
//	driven           as serve; the guest takes its time to drive its vsock
//	exit             complain and exit before QMP
//	mute             never accept
//	greet            say hello and nothing more
//	bye              say hello and exit
//	reset, poweroff  tell so after the negotiation, print on the console, exit
//	garbage          send what is no QMP after the negotiation
//	migrating        exit when it is told to read a template, or before one is written
func runFakeQEMU(behaviour string, args []string) int {
	if behaviour == "exit" {
		return fail("qemu: could not set up host forwarding rule\x1b[31m")
	}
	for _, path := range []string{"kernel", "initrd"} {
		if _, err := os.ReadFile(fdPath(number(args, "-"+path+` /proc/self/fd/(\d+)`))); err != nil {
			return fail("%s: %v", path, err)
		}
	}
	listener, err := net.FileListener(inherited(number(args, `id=qmp,fd=(\d+)`)))
	if err != nil {
		return fail("qmp: %v", err)
	}
	if behaviour == "mute" {
		select {}
	}
	conn, err := listener.Accept()
	if err != nil {
		return fail("qmp: %v", err)
	}
	console := inherited(number(args, `id=console,fd=(\d+)`))
	if behaviour == "ring" {
		fmt.Fprintln(inherited(number(args, `id=vsock,fd=(\d+)`)), "ring")
	}
	events := func(reason string) []qmptest.Step {
		fmt.Fprintf(console, "last words\r\n")
		return []qmptest.Step{qmptest.Hello(), qmptest.Event("SHUTDOWN", map[string]any{"reason": reason}), qmptest.Close()}
	}
	script := []qmptest.Step{qmptest.Hello()}
	switch behaviour {
	case "old":
		for range 2 {
			script = append(script, qmptest.Expect("x-query-virtio"), qmptest.Fail("CommandNotFound", "no such command"))
		}
	case "driven":
		script = append(script, driven()...)
	}
	switch behaviour {
	case "serve", "ring", "old", "driven":
		script = append(script, qmptest.Expect("system_powerdown"), qmptest.Return(nil),
			qmptest.Event("SHUTDOWN", map[string]any{"reason": "guest-shutdown"}), qmptest.Close())
	case "greet":
		script = []qmptest.Step{qmptest.Greet(7, 2, 0), qmptest.Expect("qmp_capabilities")}
	case "bye":
		script = []qmptest.Step{qmptest.Greet(7, 2, 0), qmptest.Close()}
	case "reset":
		fmt.Fprintf(console, "Kernel panic - not syncing: \x1b[31mboo\r\n")
		script = events("guest-reset")
	case "poweroff":
		script = events("guest-shutdown")
	case "garbage":
		script = append(script, qmptest.Raw("\x00\n"))
	case "migrating":
		if strings.Contains(strings.Join(args, " "), "-incoming defer") {
			script = append(script, qmptest.Expect("migrate-set-capabilities"), qmptest.Return(nil), qmptest.Expect("getfd"), qmptest.Return(nil))
		}
		script = append(script, qmptest.Do(func() { fmt.Fprintf(console, "last words\r\n") }), qmptest.Close())
	}
	if err := qmptest.Play(conn.(*net.UnixConn), script...); err != nil {
		return fail("qmp: %v", err)
	}
	if behaviour == "deaf" {
		select {}
	}
	return 0
}

// driven are three looks at the vsock: it is not there, not driven, driven.
func driven() (script []qmptest.Step) {
	list := func(devices ...map[string]string) {
		script = append(script, qmptest.Expect("x-query-virtio"), qmptest.Return(devices))
	}
	const path = "/machine/peripheral/vsock0/virtio-backend"
	other := map[string]string{"name": "virtio-rng", "path": "/machine/peripheral/rng0/virtio-backend"}
	list(other)
	for _, started := range []bool{false, true} {
		list(other, map[string]string{"name": "vhost-vsock", "path": path})
		script = append(script, qmptest.Expect("x-query-virtio-status", `{"path":"`+path+`"}`), qmptest.Return(map[string]any{"vhost-started": started}))
	}
	return script
}

// runFakeVsock behaves as told: serve (echo every stream, ring when the fake
// QEMU says so), exit (before the socket is there), never (make it).
func runFakeVsock(behaviour string, args []string) int {
	switch behaviour {
	case "exit":
		return fail("vhost-device-vsock: no such luck")
	case "never":
		select {}
	case threadBehaviour:
		runThread()
	}
	var control, streams string
	for _, arg := range args {
		if path, ok := strings.CutPrefix(arg, "--socket="); ok {
			control = path
		}
		if path, ok := strings.CutPrefix(arg, "--uds-path="); ok {
			streams = path
		}
	}
	guest, err := net.Listen("unix", streams)
	if err != nil {
		return fail("streams: %v", err)
	}
	go func() {
		for {
			conn, err := guest.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				lines := bufio.NewReader(conn)
				if line, _ := lines.ReadString('\n'); line == "CONNECT 666\n" {
					select {} // nobody there, nobody says so
				}
				fmt.Fprint(conn, "OK 1073741824\n")
				_, _ = io.Copy(conn, lines)
			}()
		}
	}()
	l, err := net.Listen("unix", control)
	if err != nil {
		return fail("control: %v", err)
	}
	conn, err := l.Accept()
	if err != nil {
		return fail("control: %v", err)
	}
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		if host, err := net.Dial("unix", fmt.Sprintf("%s_%d", streams, hybridCID)); err == nil {
			host.Close()
		}
	}
	return 0
}

// runFakeVirtiofsd behaves as told: serve (until QEMU is gone) or exit.
func runFakeVirtiofsd(behaviour string, args []string) int {
	if behaviour == "exit" {
		return fail("virtiofsd: no share today")
	}
	l, err := net.FileListener(inherited(number(args, `--fd=(\d+)`)))
	if err != nil {
		return fail("fd: %v", err)
	}
	conn, err := l.Accept()
	if err != nil {
		return fail("accept: %v", err)
	}
	_, _ = io.Copy(io.Discard, conn)
	return 0
}

// leakless runs the tests and fails when they leave goroutines, descriptors,
// or children.
func leakless(m *testing.M) int {
	before := openFiles()
	code := m.Run()
	if code != 0 {
		return code
	}
	deadline := time.Now().Add(2 * time.Second)
	for {
		err := errors.Join(leftFiles(before), leftChildren(), leftGoroutines())
		if err == nil {
			return 0
		}
		if time.Now().After(deadline) {
			return fail("leak: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func openFiles() []string {
	entries, _ := os.ReadDir("/proc/self/fd")
	var files []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && !strings.Contains(target, "anon_inode:[event") && filepath.Dir(target) != "/proc/self" {
			files = append(files, e.Name()+" "+target)
		}
	}
	return files
}

func leftFiles(before []string) error {
	var left []string
	for _, f := range openFiles() {
		if !slices.Contains(before, f) && !strings.Contains(f, "/proc/") {
			left = append(left, f)
		}
	}
	if left != nil {
		return fmt.Errorf("descriptors: %q", left)
	}
	return nil
}

func leftChildren() error {
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, task := range tasks {
		kids, _ := os.ReadFile(filepath.Join("/proc/self/task", task.Name(), "children"))
		if len(kids) > 0 {
			return fmt.Errorf("children: %s", kids)
		}
	}
	return nil
}
