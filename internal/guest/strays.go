package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// reapStrays ends the agent's children in the container's group that are none of
// its processes. Libcontainer starts a process in steps, each of which is a child
// of the agent; when one fails it waits for the first only. The others would stay
// as zombies and count against the container's limit of pids. The caller holds the
// op lock, so that nothing else is being started.
func (c *container) reapStrays() {
	own := c.names()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || own[pid] != "" || !isStray(filepath.Join("/proc", e.Name()), os.Getpid(), c.group) {
			continue
		}
		_ = unix.Kill(pid, unix.SIGKILL)
		for {
			if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
}

// isStray says whether a process is a parent's child in a group. What is no
// child need not stay what it is.
func isStray(proc string, parent int, group cgroup) bool {
	stat, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return false
	}
	// "PID (NAME) STATE PPID", where the name can have anything in it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 2 || fields[1] != strconv.Itoa(parent) {
		return false
	}
	groups, err := os.ReadFile(filepath.Join(proc, "cgroup"))
	return err == nil && slices.Contains(strings.Split(string(groups), "\n"), fmt.Sprintf("0::%s", group.name()))
}
