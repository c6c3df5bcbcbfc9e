// Package ociimage makes an OCI image of Debian's busybox-static, as the
// archive that 'ctr images import' reads: no registry, no network. The same
// busybox gives the same bytes.
package ociimage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// Name is what the image is called after the import.
const Name = "docker.io/vmshim/busybox:latest"

// Busybox is the program that Debian's busybox-static installs.
const Busybox = "/bin/busybox"

// Write writes the archive of an image with the given busybox in it.
func Write(ctx context.Context, w io.Writer, busybox string) error {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return fmt.Errorf("read busybox (of Debian's busybox-static): %w", err)
	}
	list, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return fmt.Errorf("list the applets of %s: %w", busybox, err)
	}
	layer, err := archive(root(program, strings.Fields(string(list))))
	if err != nil {
		return err
	}
	files, err := layout(layer)
	if err != nil {
		return err
	}
	out, err := archive(files)
	if err != nil {
		return err
	}
	_, err = w.Write(out)
	return err
}

// root is the image's file system. Applets are hard links: with symbolic ones
// a masked applet would mask them all.
func root(busybox []byte, applets []string) []entry {
	entries := []entry{
		dir("bin", 0o755), dir("dev", 0o755), dir("etc", 0o755), dir("home", 0o755), dir("proc", 0o755),
		dir("root", 0o700), dir("run", 0o755), dir("sys", 0o755), dir("tmp", 0o1777), dir("var", 0o755),
		file("bin/busybox", 0o755, busybox),
		file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")),
		file("etc/group", 0o644, []byte("root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n")),
	}
	for _, applet := range applets {
		if applet != "busybox" {
			entries = append(entries, link("bin/"+applet, "bin/busybox"))
		}
	}
	return entries
}

// A descriptor is how OCI images refer to a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// layout is the OCI image layout around one layer.
func layout(layer []byte) ([]entry, error) {
	blobs := []entry{dir("blobs", 0o755), dir("blobs/sha256", 0o755)}
	add := func(mediaType string, content []byte) descriptor {
		sum := sha256.Sum256(content)
		digest := hex.EncodeToString(sum[:])
		blobs = append(blobs, file("blobs/sha256/"+digest, 0o644, content))
		return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: len(content)}
	}
	addJSON := func(mediaType string, v any) (descriptor, error) {
		text, err := json.Marshal(v)
		if err != nil {
			return descriptor{}, err
		}
		return add(mediaType, text), nil
	}

	rootfs := add("application/vnd.oci.image.layer.v1.tar", layer)
	config, err := addJSON("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"sh"}},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{rootfs.Digest}},
	})
	if err != nil {
		return nil, err
	}
	const typeManifest = "application/vnd.oci.image.manifest.v1+json"
	manifest, err := addJSON(typeManifest, map[string]any{
		"schemaVersion": 2, "mediaType": typeManifest, "config": config, "layers": []descriptor{rootfs},
	})
	if err != nil {
		return nil, err
	}
	manifest.Annotations = map[string]string{"io.containerd.image.name": Name}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []descriptor{manifest},
	})
	if err != nil {
		return nil, err
	}
	return append(blobs,
		file("index.json", 0o644, index),
		file("oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)),
	), nil
}
