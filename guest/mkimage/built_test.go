package main

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmshim/vmshim/internal/guest/module"
)

// built writes an archive as guest/mkkernel does.
func built(t *testing.T, name string, files map[string]string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// A kernel without modules: what is wished for is built in, and the guest's
// index says so.
func TestBuiltKernel(t *testing.T) {
	file := built(t, "linux-source-6.12_6.12.1-1+abc_amd64.tar", map[string]string{
		"boot/vmlinux-6.12.1-vmshim":                         string(program(t)),
		"boot/config-6.12.1-vmshim":                          "#\nCONFIG_EXT4_FS=y\n",
		"usr/lib/modules/6.12.1-vmshim/modules.builtin":      "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio-pci.ko\n",
		"usr/share/doc/linux-source-6.12/changelog.Debian":   "no",
		"usr/lib/modules/6.12.1-vmshim/modules.builtin.more": "",
	})
	k, err := chooseKernel(t.Context(), apt{}, options{kernel: file})
	if err != nil {
		t.Fatal(err)
	}
	sum, err := hashFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := pkg{Name: "linux-source-6.12", Version: "6.12.1-1+abc", Arch: "amd64", SHA256: sum}
	if diff := cmp.Diff(want, k.pkg); diff != "" || k.Release != "6.12.1-vmshim" || !k.has("EXT4_FS") {
		t.Errorf("release %q, package (-want +got):\n%s", k.Release, diff)
	}
	if want, _ := compactELF(program(t)); !bytes.Equal(k.image, want) {
		t.Error("what boots is not the archive's kernel")
	}
	img := tree{}
	if err := addModules(t.Context(), img, k, []wish{{boot: true, pattern: "virtio_pci"}, {pattern: "ext*"}}); err != nil {
		t.Fatal(err)
	}
	index := "builtin ext4\nbuiltin virtio_pci\n"
	if got := string(img["usr"+module.Dir+"/"+module.IndexName].data); got != index {
		t.Errorf("index:\n%s\nwant:\n%s", got, index)
	}
	if err := addModules(t.Context(), img, k, []wish{{pattern: "xfs"}}); err == nil || !strings.Contains(err.Error(), "has no xfs") {
		t.Errorf("a module that is neither there nor built in: %v", err)
	}
}

func TestBuiltKernelRefuses(t *testing.T) {
	for name, file := range map[string]string{
		"has no kernel": built(t, "a_1_amd64.tar", map[string]string{"boot/config-1": ""}),
		"has no name":   built(t, "kernel.tar", map[string]string{"boot/vmlinux-1": string(program(t))}),
		"is not there":  filepath.Join(t.TempDir(), "a_1_amd64.tar"),
	} {
		if _, err := chooseKernel(t.Context(), apt{}, options{kernel: file}); err == nil {
			t.Errorf("an archive that %s: no error", name)
		}
	}
}
