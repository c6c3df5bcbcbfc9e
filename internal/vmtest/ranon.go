package vmtest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
)

// Main is for the TestMain of a package whose tests start machines.
func Main(m *testing.M) { os.Exit(Run(m)) }

// Run says what machines run on, runs the tests, and removes their templates.
func Run(m *testing.M) int {
	sayHost()
	code := m.Run()
	if err := templates.remove(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}

// sayHost prints one line on what machines of this host run on, unless the
// tests that boot some are skipped.
func sayHost() {
	flag.Parse()
	if testing.Short() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) //nolint:forbidigo // outside a test's life
	defer cancel()
	h, err := host()
	if h == nil {
		h = &qemu.Host{}
	}
	line := fmt.Sprintf("on accelerator %s, vsock %s, QEMU %s (%s), virtiofsd %s (%s), cgroup version %d, Linux %s, containerd %s",
		h.Accelerator, h.Vsock, h.Version, h.Machine, h.Virtiofsd, h.VirtiofsdDialect, CgroupVersion(), release(), containerd(ctx))
	if err != nil {
		line += ": " + err.Error()
	}
	fmt.Fprintln(os.Stderr, line)
}

// CgroupVersion is the version of the host's control groups.
func CgroupVersion() int {
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
		return 2
	}
	return 1
}

func release() string {
	var name unix.Utsname
	_ = unix.Uname(&name) // can't fail
	return unix.ByteSliceToString(name.Release[:])
}

// containerd is the version of the one in PATH, Debian's.
func containerd(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "containerd", "--version").Output()
	if fields := strings.Fields(string(out)); err == nil && len(fields) > 2 {
		return fields[2]
	}
	return "none"
}
