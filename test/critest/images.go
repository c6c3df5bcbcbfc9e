package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/vmshim/vmshim/test/ociimage"
)

// Registries whose images critest names.
const (
	kubernetes = "registry.k8s.io/"
	staging    = "gcr.io/k8s-staging-cri-tools/"
	old        = "k8s.gcr.io/"

	// pauseImage is containerd's sandbox image. It is none of critest's, which
	// removes those.
	pauseImage = "vmshim.test/pause:1"
)

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\n" +
		"default-user:x:1000:1000::/home:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
	group = "root:x:0:\nwww-data:x:33:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\nnogroup:x:65534:\n"

	// What busybox lacks, in the words of the awk that it has.
	pgrep = "#!/bin/sh\nfor c in /proc/[0-9]*/comm; do [ \"$(cat $c 2>/dev/null)\" = \"$1\" ] && { p=${c%/comm}; echo ${p#/proc/}; }; done\n"
	ipcs  = "#!/bin/sh\nawk 'NR > 1 { printf \"0x%08x %-10d %-10s %-10o %-10d %-10d\\n\", $1, $2, $5, $3, $4, $7 }' /proc/sysvipc/shm\n"
)

// images are all that critest 1.36 names, but for one of a certain digest.
func images(ctx context.Context, work string) (map[string]*ociimage.Layout, error) {
	program, err := build(ctx, work)
	if err != nil {
		return nil, err
	}
	as := func(path string, mode int64) ociimage.File {
		return ociimage.File{Path: path, Mode: mode, Content: program}
	}
	config := func(command ...string) ociimage.Config {
		return ociimage.Config{
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: command,
		}
	}
	all := []ociimage.Image{
		{Name: kubernetes + "e2e-test-images/busybox:1.29-2", Config: config("sh"), Files: []ociimage.File{as("bin/sh", 0o755)}},
		{Name: kubernetes + "e2e-test-images/nginx:1.14-2", Config: config("nginx"), Files: []ociimage.File{as("bin/nginx", 0o755)}},
		{Name: kubernetes + "e2e-test-images/httpd:2.4.39-4", Config: config("nginx"), Files: []ociimage.File{as("bin/nginx", 0o755)}},
		{Name: kubernetes + "e2e-test-images/nonewprivs:1.3", Config: config("/nonewprivs"), Files: []ociimage.File{as("nonewprivs", 0o4755)}},
		{Name: staging + "hostnet-nginx-" + runtime.GOARCH + ":latest", Config: config("nginx", "12003"), Files: []ociimage.File{as("bin/nginx", 0o755)}},
		{Name: pauseImage, Config: config("/pause"), Files: []ociimage.File{as("pause", 0o755)}},
	}
	for _, registry := range []string{kubernetes, old} {
		c := config("/pause")
		c.Labels = map[string]string{"registry": "any"} // other bytes than pauseImage's
		all = append(all, ociimage.Image{Name: registry + "pause:3.9", Config: c, Files: []ociimage.File{as("pause", 0o755)}})
	}
	users := []ociimage.File{
		{Path: "etc/passwd", Mode: 0o644, Content: []byte(passwd)}, {Path: "etc/group", Mode: 0o644, Content: []byte(group)},
	}
	for name, user := range map[string]string{
		"test-image-user-uid":            "1002",
		"test-image-user-username":       "www-data",
		"test-image-user-uid-group":      "1003:1004",
		"test-image-user-username-group": "www-data:1004",
		"test-image-predefined-group":    "1000",
	} {
		c := config("sh")
		c.User = user
		all = append(all, ociimage.Image{Name: staging + name + ":latest", Config: c, Files: users})
	}
	for _, name := range []string{
		"test-image-1:latest", "test-image-2:latest", "test-image-3:latest", "test-image-latest:latest",
		"test-image-digest:latest", "test-image-tag:test", "test-image-tag:all",
	} {
		all = append(all, ociimage.Image{Name: staging + name, Config: config("sh"), Files: marker(name)})
	}
	for _, tag := range []string{"1", "2", "3"} { // the same one
		all = append(all, ociimage.Image{Name: staging + "test-image-tags:" + tag, Config: config("sh"), Files: marker("tags")})
	}
	made := map[string]*ociimage.Layout{}
	for _, image := range all {
		image.Files = append([]ociimage.File{
			{Path: "bin/pgrep", Mode: 0o755, Content: []byte(pgrep)},
			{Path: "bin/ipcs", Mode: 0o755, Content: []byte(ipcs)},
			{Path: "var/run/.keep", Mode: 0o644},
		}, image.Files...)
		if made[image.Name], err = ociimage.New(ctx, image, ociimage.Busybox); err != nil {
			return nil, fmt.Errorf("make image %s: %w", image.Name, err)
		}
	}
	return made, nil
}

func marker(text string) []ociimage.File {
	return []ociimage.File{{Path: "marker", Mode: 0o644, Content: []byte(text)}}
}

// build compiles what stands in for the images' own programs.
func build(ctx context.Context, work string) ([]byte, error) {
	path := filepath.Join(work, "program")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", path,
		"github.com/vmshim/vmshim/test/critest/program")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the images' program: %w: %s", err, out)
	}
	return os.ReadFile(path)
}
