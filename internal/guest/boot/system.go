package boot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// sysctls that differ from the kernel's defaults, as hosts of containers have
// them: they are not namespaced, so nobody else can set them.
var sysctls = map[string]string{
	"fs.inotify.max_user_instances": "8192",
	"vm.max_map_count":              "262144",
	// The kernel compacts when it needs to, and does not wake an idle machine twice
	// a second (HPAGE_FRAG_CHECK_INTERVAL_MSEC) to look whether it should.
	"vm.compaction_proactiveness": "0",
	"kernel.panic_on_oops":        "1",
	"kernel.pid_max":              "4194304",
	"kernel.threads-max":          "1048576", // the default is for the memory at boot; cgroups limit
	// Not the default /sbin/modprobe, which the kernel's own initialization
	// would already run, a dozen times and in vain.
	"kernel.modprobe":      "/usr/bin/modprobe",
	"kernel.keys.maxkeys":  "20000",
	"kernel.keys.maxbytes": "2000000",
}

func setSysctls() error {
	var errs []error
	for key, value := range sysctls {
		file := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
		err := os.WriteFile(file, []byte(value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // of a part that the kernel is built without
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// setLimits sets what processes without limits of their own inherit.
func setLimits() error {
	// Programs that close all fds they may have are slow with a high soft limit.
	files := unix.Rlimit{Cur: 1 << 10, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("open files: %w", err)
	}
	// The defaults are for the memory at boot.
	for _, resource := range []int{unix.RLIMIT_NPROC, unix.RLIMIT_SIGPENDING} {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
			return fmt.Errorf("processes and signals: %w", err)
		}
	}
	return nil
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r)
}

// idle makes the calling thread run only when no other wants to, or not.
func idle(on bool) {
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL}
	if on {
		attr.Policy = unix.SCHED_IDLE
	}
	_ = unix.SchedSetAttr(0, &attr, 0) // without it boot is only slower
}
