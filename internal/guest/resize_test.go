package guest

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestParseExt4(t *testing.T) {
	image := t.TempDir() + "/img"
	for _, args := range [][]string{
		{"-b", "4096", image, "8M"}, {"-b", "1024", "-O", "^64bit", image, "5M"}, {"-t", "ext2", "-b", "2048", image, "6M"},
	} {
		command(t, "mkfs.ext4", append([]string{"-q", "-F"}, args...)...)
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		blocks, size, ok := parseExt4(b[1024:2048])
		if !ok || blocks*size != uint64(len(b)) {
			t.Errorf("%v: %d blocks of %d in %d bytes, %v", args, blocks, size, len(b), ok)
		}
		os.Remove(image)
	}
}

func FuzzParseExt4(f *testing.F) {
	super := make([]byte, 1024)
	super[0x38], super[0x39], super[0x18], super[0x60] = 0x53, 0xef, 2, 0x80
	f.Add(super)
	f.Add(super[:1000])
	f.Fuzz(func(t *testing.T, b []byte) {
		blocks, size, ok := parseExt4(b)
		if ok && (size < 1024 || size > 65536 || blocks*size/size != blocks) {
			t.Errorf("%d blocks of %d", blocks, size)
		}
	})
}

// xfs grows to a size, to the end of its disk, waits for the disk to grow, and
// never shrinks. (ext4 wants a privilege that not every host of tests has: it is
// in TestVMVolumes.)
func TestGrowXFS(t *testing.T) {
	d := testDevices(t)
	d.sys = "/sys"
	image, dir := t.TempDir()+"/img", t.TempDir()
	truncate := func(mib int64) {
		if err := os.Truncate(image, mib<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	truncate(320)
	command(t, "mkfs.xfs", "-q", image)
	loop := command(t, "losetup", "--find", "--show", image)
	defer command(t, "losetup", "--detach", loop)
	if err := unix.Mount(loop, dir, "xfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	sizeOf := func() uint64 {
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		blocks, size, err := xfs{f}.blocks()
		if err != nil {
			t.Fatal(err)
		}
		return blocks * size >> 20
	}
	grow := func(mib, want uint64) {
		t.Helper()
		if err := d.grow(t.Context(), dir, mib<<20); err != nil {
			t.Errorf("grow to %d: %v", mib, err)
		}
		if got := sizeOf(); got != want {
			t.Errorf("grown to %d MiB, want %d", got, want)
		}
	}
	truncate(640)
	command(t, "losetup", "--set-capacity", loop)
	grow(480, 480)
	grow(100, 480)
	grow(0, 640)
	d.timeout = 100 * time.Millisecond
	grow(0, 640)
	if err := d.grow(t.Context(), dir, 700<<20); err == nil || !strings.Contains(err.Error(), "wait for disk of 734003200 bytes") {
		t.Errorf("grown beyond the disk: %v", err)
	}
	// The disk grows while somebody waits.
	d.timeout = time.Minute
	done := make(chan error, 1)
	go func() { done <- d.grow(t.Context(), dir, 700<<20) }()
	truncate(700)
	command(t, "losetup", "--set-capacity", loop)
	if err := <-done; err != nil || sizeOf() != 700 {
		t.Errorf("%v, %d MiB", err, sizeOf())
	}
	if err := d.grow(t.Context(), "/proc", 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("proc grown: %v", err)
	}
}
