package main

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWriteCPIO(t *testing.T) {
	image := func() []byte {
		img := tree{}
		img.file("usr/bin/agent", 0o755, []byte("program"))
		img.link("bin", "usr/bin")
		img.char("dev/console", 0o600, 5, 1)
		img.dir("tmp", 0o1777)
		var b bytes.Buffer
		if err := writeCPIO(&b, img); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	first := image()
	want := []string{
		`bin 120777 0:0 "usr/bin"`,
		`dev 40755 0:0 ""`,
		`dev/console 20600 5:1 ""`,
		`tmp 41777 0:0 ""`,
		`usr 40755 0:0 ""`,
		`usr/bin 40755 0:0 ""`,
		`usr/bin/agent 100755 0:0 "program"`,
		`TRAILER!!! 0 0:0 ""`,
	}
	if diff := cmp.Diff(want, readCPIO(t, first)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for range 20 { // maps are walked in another order each time
		if !bytes.Equal(first, image()) {
			t.Fatal("equal trees give different bytes")
		}
	}
}

// readCPIO prints one entry a line and checks what is to be the same always.
func readCPIO(t *testing.T, b []byte) (entries []string) {
	t.Helper()
	seen := map[uint64]bool{}
	for len(b) > 0 {
		if string(b[:6]) != "070701" {
			t.Fatalf("entry begins with %q", b[:6])
		}
		var f [13]uint64
		for i := range f {
			n, err := strconv.ParseUint(string(b[6+8*i:14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			f[i] = n
		}
		ino, mode, uid, gid, mtime, size, major, minor, nameSize := f[0], f[1], f[2], f[3], f[5], f[6], f[9], f[10], f[11]
		name := strings.TrimSuffix(string(b[110:110+nameSize]), "\x00")
		if seen[ino] || uid != 0 || gid != 0 || mtime != 0 {
			t.Errorf("%s: inode %d (seen: %v), owner %d:%d, time %d", name, ino, seen[ino], uid, gid, mtime)
		}
		seen[ino] = true
		align := func(n uint64) uint64 { return (n + 3) &^ 3 }
		data := align(110 + nameSize)
		entries = append(entries, fmt.Sprintf("%s %o %d:%d %q", name, mode, major, minor, b[data:data+size]))
		b = b[data+align(size):]
	}
	return entries
}
