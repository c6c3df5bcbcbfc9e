package daemon

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Leftovers lists what the containers with the given ids (in ctr's default
// namespace) and their sandboxes left on the host, other than the daemon
// itself: processes and mounts that name a file of the daemon's directory, sandboxes in
// the state directory of the shim, bundles, sockets of shims.
func (d *Daemon) Leftovers(stateDir string, ids ...string) ([]string, error) {
	processes, err := d.Processes()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, p := range processes {
		found = append(found, fmt.Sprintf("process %d %q", p.PID, p.Args))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, d.cfg.Dir+"/") {
			found = append(found, "mount "+strings.TrimSpace(line))
		}
	}
	paths, err := filepath.Glob(filepath.Join(stateDir, strings.Repeat("[0-9a-f]", 16)))
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		paths = append(paths, d.Bundle(id), d.shimSocket(id))
	}
	for _, path := range paths {
		if _, err := os.Lstat(path); err == nil {
			found = append(found, "file "+path)
		}
	}
	return found, nil
}

// shimSocket is where containerd wants a shim to listen.
func (d *Daemon) shimSocket(id string) string {
	return fmt.Sprintf("/run/containerd/s/%x", sha256.Sum256([]byte(filepath.Join(d.Address(), "default", id))))
}

// A Process was started by the daemon, at whatever remove.
type Process struct {
	PID  int
	Args []string
}

// Processes finds what the daemon started by its directory in environment or
// arguments. Processes that change their environment can't hide: the kernel
// shows the one they were started with.
func (d *Daemon) Processes() (found []Process, _ error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if pid == os.Getpid() || pid == d.cmd.Process.Pid {
			continue
		}
		environ, _ := os.ReadFile(filepath.Join(dir, "environ")) // gone: not found
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if bytes.Contains(environ, []byte(d.cfg.Dir+"/")) || bytes.Contains(cmdline, []byte(d.cfg.Dir+"/")) {
			found = append(found, Process{pid, strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")})
		}
	}
	return found, nil
}
