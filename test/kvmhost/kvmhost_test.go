package main

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmshim/vmshim/internal/vmtest"
)

func TestEnvironment(t *testing.T) {
	got := environment([]string{"HOME=/root", "LD_PRELOAD=x", "VMSHIM_GUEST=/x", "GOFLAGS=-v", "SSH_AUTH_SOCK=/x", "HOMER=x"})
	if want := []string{"HOME=/root", "VMSHIM_GUEST=/x", "GOFLAGS=-v"}; !slices.Equal(got, want) {
		t.Errorf("environment %q, want %q", got, want)
	}
}

// A machine gets no file written that it was not asked for.
func TestStore(t *testing.T) {
	dir := t.TempDir()
	asked := []string{filepath.Join(dir, "*.json")}
	for _, data := range []string{"old", "new"} {
		if err := store(frame{File: filepath.Join(dir, "a.json"), Mode: 0o640, Data: []byte(data)}, asked, data == "old"); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "a.json")); string(b) != "oldnew" {
		t.Errorf("file has %q, %v", b, err)
	}
	for _, name := range []string{filepath.Join(dir, "b.txt"), filepath.Join(dir, "sub/a.json"), dir + "/../a.json"} {
		if err := store(frame{File: name, Data: []byte("x")}, asked, true); err == nil {
			t.Errorf("%s was written", name)
		}
	}
}

func TestParse(t *testing.T) {
	o, err := parse([]string{"-image", "/i", "-get", "a", "-get", "b", "--", "sh", "-c", "x"})
	if err != nil || !slices.Equal(o.get, []string{"a", "b"}) || !slices.Equal(o.args, []string{"sh", "-c", "x"}) {
		t.Errorf("options %+v, %v", o, err)
	}
	if _, err := parse([]string{"true"}); err == nil {
		t.Error("there is no image")
	}
}

// A machine that says nothing is lost, one that says that it lives is not.
func TestListenSilence(t *testing.T) {
	here, machine := net.Pipe()
	defer here.Close()
	const silence = 100 * time.Millisecond
	began := time.Now()
	go func() {
		out := newSender(machine)
		for range 8 {
			if out.send(frame{Alive: true}) != nil {
				return
			}
			time.Sleep(silence / 4)
		}
	}()
	err := listen(here, silence, nil, nil)
	if _, lost := errors.AsType[*lostError](err); !lost || !strings.Contains(err.Error(), "said nothing for 100ms") {
		t.Errorf("error %v", err)
	}
	if after := time.Since(began); after < 2*silence {
		t.Errorf("lost after %v", after)
	}
}

// A hanging machine says perhaps that it is up, and answers to nothing.
type hanging struct{ ready chan struct{} }

func (h hanging) Ready() <-chan struct{} { return h.ready }
func (h hanging) Done() <-chan struct{}  { return nil }

func (h hanging) Dial(ctx context.Context, _ uint32) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A machine that hangs on its way up is not waited for any longer.
func TestReachSilence(t *testing.T) {
	up := hanging{make(chan struct{})}
	close(up.ready)
	for name, vm := range map[string]hanging{"boot": {}, "dial": up} {
		_, err := reach(t.Context(), vm, 50*time.Millisecond)
		if err == nil || !strings.Contains(err.Error(), "said nothing for 50ms") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Whatever processor it speaks from, the machine says that it lives.
func TestSayAlive(t *testing.T) {
	here, machine := net.Pipe()
	defer here.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- newSender(machine).sayAlive(ctx, time.Millisecond) }()
	in := gob.NewDecoder(here)
	for range 2 * runtime.NumCPU() {
		var f frame
		if err := in.Decode(&f); err != nil || !f.Alive {
			t.Fatalf("frame %+v, %v", f, err)
		}
	}
	cancel()
	here.Close()
	if err := <-done; err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
}

// command is this program as it was built, for a machine of this release.
func command(t *testing.T, flags []string, args ...string) *exec.Cmd {
	t.Helper()
	vmtest.Need(t, vmtest.Root, vmtest.QEMU, vmtest.Share)
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(checkout(wd), "_output")
	image := filepath.Join(out, "kvmhost-"+ownRelease())
	if _, err := os.Stat(filepath.Join(image, "vmlinux")); err != nil {
		t.Fatalf("run 'make kvm-host-image' first: %v", err)
	}
	all := slices.Concat([]string{"-image", image, "-vhost-device-vsock", filepath.Join(out, "bin/vhost-device-vsock"), "-memory", "1024", "-timeout", "3m"}, flags, []string{"--"}, args)
	cmd := exec.Command(filepath.Join(out, "bin/kvmhost"), all...)
	cmd.Dir = t.TempDir() // in the machine, too
	return cmd
}

// TestVMKVMHost runs a command: what it says, how it ends, what it writes.
func TestVMKVMHost(t *testing.T) {
	cmd := command(t, []string{"-get", "answer*"}, "sh", "-c", `
		set -e
		for device in kvm vhost-vsock vhost-net net/tun; do test -w /dev/$device; done
		grep -q memory /sys/fs/cgroup/system.slice/cgroup.controllers
		echo out; echo err >&2
		cat question; echo 42 > answer; echo lost > question; rm -r /etc
		exit 7`)
	question := filepath.Join(cmd.Dir, "question")
	if err := os.WriteFile(question, []byte("what\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != 7 || stdout.String() != "out\nwhat\n" || !strings.Contains(stderr.String(), "err\n") {
		t.Errorf("exit code %d, %v\nstdout: %s\nstderr: %s", code, err, stdout.String(), stderr.String())
	}
	for name, want := range map[string]string{"question": "what\n", "answer": "42\n"} {
		if b, err := os.ReadFile(filepath.Join(cmd.Dir, name)); string(b) != want {
			t.Errorf("%s has %q, %v, want %q", name, b, err, want)
		}
	}
}

// TestVMKVMHostKilled kills it without a warning: nothing is left.
func TestVMKVMHostKilled(t *testing.T) {
	cmd := command(t, nil, "sh", "-c", "echo up; sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 3)); err != nil {
		t.Error(err)
	}
	below := descendants(cmd.Process.Pid)
	if len(below) < 3 { // the child, QEMU, virtiofsd
		t.Errorf("processes %v", below)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, pid := range below {
		if err := gone(ctx, pid); err != nil {
			t.Errorf("process %d lives on: %v", pid, err)
		}
	}
}

// TestVMKVMHostAgain loses one machine: the command is run in another one.
func TestVMKVMHostAgain(t *testing.T) {
	cmd := command(t, []string{"-again", "1"}, "sh", "-c", `echo begin; echo c >/proc/sysrq-trigger`)
	out, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != failed || strings.Count(string(out), "begin\n") != 2 || !strings.Contains(string(out), "another one (1 of 1)") {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

// TestVMKVMHostTimeout bounds it.
func TestVMKVMHostTimeout(t *testing.T) {
	cmd := command(t, []string{"-timeout", "2s"}, "sleep", "1000")
	out, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != failed || !strings.Contains(string(out), "not done after 2s") {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}
}

func descendants(pid int) (all []int) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // whichever thread started it
	for _, task := range tasks {
		more, _ := os.ReadFile(task)
		text = append(text, more...)
	}
	for field := range strings.FieldsSeq(string(text)) {
		child, err := strconv.Atoi(field)
		if err == nil && !slices.Contains(all, child) {
			all = append(append(all, child), descendants(child)...)
		}
	}
	return all
}

func gone(ctx context.Context, pid int) error {
	for {
		err := syscall.Kill(pid, 0)
		if errors.Is(err, syscall.ESRCH) {
			return nil
		}
		state, rerr := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(rerr, fs.ErrNotExist) || bytes.Contains(state, []byte(") Z ")) { // nobody reaps orphans here
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w: %s", ctx.Err(), state)
		}
	}
}
