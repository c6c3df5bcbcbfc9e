package main

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
)

// Types of files, as in stat(2) and in the archive.
const (
	modeType = 0o170000
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

// A node is one file of the image.
type node struct {
	mode         uint32 // type and permissions
	data         []byte // of a file; the target of a link
	major, minor uint32 // of a device
}

// A tree is what an archive contains, by path without a leading slash.
type tree map[string]node

func (t tree) dir(name string, perm uint32) {
	t.parents(name)
	t[name] = node{mode: modeDir | perm}
}

func (t tree) file(name string, perm uint32, data []byte) {
	t.parents(name)
	t[name] = node{mode: modeFile | perm, data: data}
}

func (t tree) link(name, target string) {
	t.parents(name)
	t[name] = node{mode: modeLink | 0o777, data: []byte(target)}
}

func (t tree) char(name string, perm, major, minor uint32) {
	t.parents(name)
	t[name] = node{mode: modeChar | perm, major: major, minor: minor}
}

func (t tree) parents(name string) {
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		if _, ok := t[d]; !ok {
			t[d] = node{mode: modeDir | 0o755}
		}
	}
}

// writeCPIO writes the tree in the form the kernel unpacks ("newc", see
// Documentation/driver-api/early-userspace/buffer-format.rst). Order, inode
// numbers, owners and times are fixed, so that equal trees give equal bytes.
func writeCPIO(w io.Writer, t tree) error {
	b := bufio.NewWriterSize(w, 1<<20)
	ino := 0
	for _, name := range slices.Sorted(maps.Keys(t)) { // parents sort before their files
		ino++
		writeEntry(b, name, ino, t[name])
	}
	writeEntry(b, "TRAILER!!!", 0, node{})
	return b.Flush()
}

func writeEntry(b *bufio.Writer, name string, ino int, n node) {
	const header = 110
	nlink, uid, gid, mtime, devmajor, devminor, check := 1, 0, 0, 0, 0, 0, 0
	fmt.Fprintf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		ino, n.mode, uid, gid, nlink, mtime, len(n.data), devmajor, devminor, n.major, n.minor, len(name)+1, check, name)
	pad(b, header+len(name)+1)
	_, _ = b.Write(n.data) // a bufio.Writer keeps its first error for Flush
	pad(b, len(n.data))
}

func pad(b *bufio.Writer, n int) {
	for ; n%4 != 0; n++ {
		_ = b.WriteByte(0)
	}
}
