package pause

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
)

func TestProgram(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		t.Run(arch, func(t *testing.T) {
			b, err := program(arch, "a name that is longer than a name may be")
			if err != nil {
				t.Fatal(err)
			}
			f, err := elf.NewFile(bytes.NewReader(b))
			if err != nil {
				t.Fatal(err)
			}
			if n := len(f.Progs); n != 1 {
				t.Fatalf("%d segments", n)
			}
			if p := f.Progs[0]; f.Entry < p.Vaddr || f.Entry >= p.Vaddr+p.Filesz || p.Filesz != uint64(len(b)) || f.Entry%4 != 0 {
				t.Errorf("entry %#x is not in %+v", f.Entry, p)
			}
		})
	}
	if _, err := program("mips", ""); err == nil {
		t.Error("a program for mips")
	}
}

// start runs the program for this machine and waits until it has its name.
func start(t *testing.T, attr *syscall.SysProcAttr) *exec.Cmd {
	t.Helper()
	b, err := program(runtime.GOARCH, "pause-test")
	if err != nil {
		need.Missing(t, "%v", err)
	}
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, b, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for comm := ""; comm != "pause-test\n"; {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		comm = string(b)
	}
	return cmd
}

func TestEndsBySignal(t *testing.T) {
	cmd := start(t, nil)
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Error(err)
	}
	exit, ok := errors.AsType[*exec.ExitError](cmd.Wait())
	if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("ended with %v", exit)
	}
}

// TestReaps has it as the first process of a pid namespace, in which an orphan
// ends.
func TestReaps(t *testing.T) {
	need.Root(t)
	first := start(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID})
	defer func() {
		_ = first.Process.Kill()
		_ = first.Wait()
	}()
	ns := fmt.Sprintf("/proc/%d/ns/pid", first.Process.Pid)
	script := `sh -c 'echo orphan; exec sleep 0.1 >/dev/null' & exit`
	if out, err := exec.Command("nsenter", "--pid="+ns, "sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	children := fmt.Sprintf("/proc/%d/task/%d/children", first.Process.Pid, first.Process.Pid)
	for deadline := time.Now().Add(10 * time.Second); ; {
		b, err := os.ReadFile(children)
		if err != nil {
			need.Missing(t, "%v", err) // a kernel without CONFIG_PROC_CHILDREN
		}
		if len(b) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("children left: %s", b)
		}
	}
}
