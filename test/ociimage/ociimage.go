// Package ociimage makes OCI images of Debian's busybox-static and a few files
// of the caller's: as the archive that 'ctr images import' reads, or as blobs for
// a registry. No network is needed, and the same files give the same bytes.
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

// Name is what the image of Write is called after the import.
const Name = "docker.io/vmshim/busybox:latest"

// Busybox is the program that Debian's busybox-static installs.
const Busybox = "/bin/busybox"

// An Image is what New makes a Layout of.
type Image struct {
	Name   string // of the import: registry, repository, tag
	Config Config
	Files  []File // beside busybox' or in their place
}

// Config is how a container of the image is run.
type Config struct {
	User       string   `json:"User,omitempty"`
	Env        []string `json:"Env,omitempty"`
	Entrypoint []string `json:"Entrypoint,omitempty"`
	Cmd        []string `json:"Cmd,omitempty"`
	// Labels make images of the same files differ.
	Labels map[string]string `json:"Labels,omitempty"`
}

// A File is one of the root file system. Directories in its path are made.
type File struct {
	Path    string // relative
	Mode    int64  // as chmod(1) takes it; root owns it
	Content []byte
}

// A Layout is an image in the form of OCI's image layout.
type Layout struct {
	Digest string            // of the manifest
	Blobs  map[string][]byte // by digest

	files []entry
}

// Media types.
const (
	TypeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
	typeIndex    = "application/vnd.oci.image.index.v1+json"
)

// Write writes the archive of an image with the given busybox in it.
func Write(ctx context.Context, w io.Writer, busybox string) error {
	l, err := New(ctx, Image{Name: Name, Config: Config{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}}}, busybox)
	if err != nil {
		return err
	}
	return l.Write(w)
}

// New makes an image with the given busybox in it.
func New(ctx context.Context, image Image, busybox string) (*Layout, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, fmt.Errorf("read busybox (of Debian's busybox-static): %w", err)
	}
	list, err := exec.CommandContext(ctx, busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets of %s: %w", busybox, err)
	}
	layer, err := archive(with(root(program, strings.Fields(string(list))), image.Files))
	if err != nil {
		return nil, err
	}
	return layout(image, layer)
}

// Write writes the archive.
func (l *Layout) Write(w io.Writer) error {
	out, err := archive(l.files)
	if err != nil {
		return err
	}
	_, err = w.Write(out)
	return err
}

// with puts files among the entries, in place of those of the same name.
func with(entries []entry, files []File) []entry {
	known := map[string]int{}
	for i, e := range entries {
		known[e.header.Name] = i
	}
	for _, f := range files {
		for i, c := range f.Path {
			if parent := f.Path[:i]; c == '/' && !has(known, parent+"/") {
				known[parent+"/"] = len(entries)
				entries = append(entries, dir(parent, 0o755))
			}
		}
		e := file(f.Path, f.Mode, f.Content)
		if i, ok := known[f.Path]; ok {
			entries[i] = e
			continue
		}
		known[f.Path] = len(entries)
		entries = append(entries, e)
	}
	return entries
}

func has(known map[string]int, name string) bool { _, ok := known[name]; return ok }

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
func layout(image Image, layer []byte) (*Layout, error) {
	l := &Layout{Blobs: map[string][]byte{}, files: []entry{dir("blobs", 0o755), dir("blobs/sha256", 0o755)}}
	add := func(mediaType string, content []byte) descriptor {
		sum := sha256.Sum256(content)
		digest := hex.EncodeToString(sum[:])
		l.Blobs["sha256:"+digest] = content
		l.files = append(l.files, file("blobs/sha256/"+digest, 0o644, content))
		return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: len(content)}
	}
	addJSON := func(mediaType string, v any) (descriptor, error) {
		text, err := json.Marshal(v)
		if err != nil {
			return descriptor{}, err
		}
		return add(mediaType, text), nil
	}

	rootfs := add(typeLayer, layer)
	config, err := addJSON(typeConfig, map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       image.Config,
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{rootfs.Digest}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := addJSON(TypeManifest, map[string]any{
		"schemaVersion": 2, "mediaType": TypeManifest, "config": config, "layers": []descriptor{rootfs},
	})
	if err != nil {
		return nil, err
	}
	l.Digest = manifest.Digest
	manifest.Annotations = map[string]string{"io.containerd.image.name": image.Name}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": typeIndex, "manifests": []descriptor{manifest},
	})
	if err != nil {
		return nil, err
	}
	l.files = append(l.files,
		file("index.json", 0o644, index),
		file("oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`)),
	)
	return l, nil
}
