package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// packages are what a host of the tests has, beside Debian's essential ones.
var packages = []string{
	"qemu-system-x86", "virtiofsd", "containerd", "runc", "containernetworking-plugins",
	"busybox-static", "ca-certificates", "e2fsprogs", "git", "iproute2", "iptables", "kmod", "make", "mount",
	"procps", "util-linux", "xfsprogs",
}

// releaseRoot is the root file system of a release of Debian: this machine's,
// or one that is made once and kept.
func releaseRoot(ctx context.Context, release string) (string, error) {
	if release == "" || release == ownRelease() {
		return "/", nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "vmshim", "kvmhost-"+release)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	include := packages
	if release == "bookworm" { // has it in qemu-system-common
		include = slices.DeleteFunc(slices.Clone(packages), func(p string) bool { return p == "virtiofsd" })
	}
	fmt.Fprintf(os.Stderr, "kvmhost: making a Debian %s in %s (once; takes some minutes, 650 MB)\n", release, dir)
	tmp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil { // the root of users, too
		return "", err
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", "--variant=minbase", "--include="+strings.Join(include, ","), release, tmp)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it unmounts what it mounted
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mmdebstrap: %w\n%s", err, out)
	}
	err = os.Rename(tmp, dir)
	if errors.Is(err, fs.ErrExist) { // somebody else was faster
		err = nil
	}
	return dir, err
}

// emulatorRoot is the root file system whose QEMU runs the machine. Debian 12's
// was seen to err in SVM: machines that boot at once in the machine hang, and its
// kernel panics.
func emulatorRoot(ctx context.Context) (string, error) {
	if nested() {
		return "/", nil
	}
	return releaseRoot(ctx, "trixie")
}

// ownRelease is this machine's, as os-release(5) has it.
func ownRelease() string {
	text, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return name
		}
	}
	return ""
}
