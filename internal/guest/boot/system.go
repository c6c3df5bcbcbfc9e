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
	"kernel.panic_on_oops":          "1",
	"kernel.keys.maxkeys":           "20000",
	"kernel.keys.maxbytes":          "2000000",
}

func setSysctls() error {
	var errs []error
	for key, value := range sysctls {
		file := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// setLimits sets what processes without limits of their own inherit.
func setLimits() error {
	const files = 1 << 20 // fs.nr_open
	limit := unix.Rlimit{Cur: files, Max: files}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("open files: %w", err)
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
