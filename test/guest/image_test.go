package guest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vmshim/vmshim/internal/vmtest"
)

// The same packages and the same agent give the same bytes: two images made
// now, and the one that was made before.
func TestVMImageReproducible(t *testing.T) {
	vmtest.Need(t, vmtest.Image)
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	files := func(out string) (all [][]byte) {
		for _, name := range []string{"manifest.txt", "vmlinux", "initrd.img"} {
			b, err := os.ReadFile(filepath.Join(out, name))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b)
		}
		return all
	}
	build := func() [][]byte {
		out := t.TempDir()
		cmd := exec.CommandContext(t.Context(), "go", "run", "./guest/mkimage", "-agent", "_output/bin/vmshim-agent",
			"-cache", filepath.Join(cache, "vmshim/debs"), "-out", out)
		cmd.Dir = root
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		return files(out)
	}
	first := build()
	for what, other := range map[string][][]byte{"built again": build(), "built before": files(filepath.Join(root, "_output/guest"))} {
		for i, name := range []string{"manifest.txt", "vmlinux", "initrd.img"} {
			if !bytes.Equal(first[i], other[i]) {
				t.Errorf("%s is another when %s", name, what)
			}
		}
	}
	t.Logf("vmlinux %d MiB, initrd %d MiB", len(first[1])>>20, len(first[2])>>20)
}
