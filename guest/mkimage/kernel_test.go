package main

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"io"
	"os"
	"strings"
	"testing"
)

// program is some ELF file of this machine.
func program(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCompactELF(t *testing.T) {
	before := program(t)
	after, err := compactELF(before)
	if err != nil {
		t.Fatal(err)
	}
	if len(after) > len(before) {
		t.Errorf("it grew from %d to %d bytes", len(before), len(after))
	}
	old, now := loads(t, before), loads(t, after)
	if len(old) != len(now) || len(old) == 0 {
		t.Fatalf("%d segments, want %d", len(now), len(old))
	}
	for i := range old {
		if old[i].Vaddr != now[i].Vaddr || old[i].Memsz != now[i].Memsz || !bytes.Equal(memory(t, old[i]), memory(t, now[i])) {
			t.Errorf("segment %d is another after loading", i)
		}
	}
}

// A kernel's first segment may end in its notes, and they in zeros.
func TestCompactELFNoteAtEnd(t *testing.T) {
	note := []byte("where to enter\x00\x00\x00\x00")
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Version: uint32(elf.EV_CURRENT), Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2}
	copy(h.Ident[:], elf.ELFMAG+"\x02\x01\x01") // 64 bits, little endian
	size, at := uint64(len(note)), uint64(64+2*56)
	var b bytes.Buffer
	for _, part := range []any{
		h,
		elf.Prog64{Type: uint32(elf.PT_LOAD), Off: at, Vaddr: 0x1000, Filesz: 4 + size, Memsz: 4 + size},
		elf.Prog64{Type: uint32(elf.PT_NOTE), Off: at + 4, Vaddr: 0x1004, Filesz: size, Memsz: size},
		[]byte("code"), note,
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	after, err := compactELF(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(after))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(f.Progs[1].Open()); err != nil || !bytes.Equal(got, note) {
		t.Errorf("the note is %q, %v", got, err)
	}
}

func loads(t *testing.T, b []byte) (progs []*elf.Prog) {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Progs {
		switch p.Type {
		case elf.PT_LOAD:
			progs = append(progs, p)
		case elf.PT_NOTE:
			if note, err := io.ReadAll(p.Open()); err != nil || len(bytes.Trim(note, "\x00")) == 0 {
				t.Errorf("a note got lost: %q, %v", note, err)
			}
		}
	}
	return progs
}

func memory(t *testing.T, p *elf.Prog) []byte {
	t.Helper()
	m := make([]byte, p.Memsz)
	if _, err := io.ReadFull(p.Open(), m[:p.Filesz]); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestCompactELFRefuses(t *testing.T) {
	whole := program(t)
	for name, b := range map[string][]byte{"empty": nil, "text": []byte(strings.Repeat("kernel ", 100)), "half": whole[:len(whole)/2], "header": whole[:64]} {
		if _, err := compactELF(b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A bzImage: a boot sector that says where the compressed kernel is.
func TestUnpack(t *testing.T) {
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(program(t)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	bz := make([]byte, 5*512+100)
	bz[0x1f1] = 4
	copy(bz[0x202:], "HdrS")
	binary.LittleEndian.PutUint32(bz[0x248:], 100)
	binary.LittleEndian.PutUint32(bz[0x24c:], uint32(packed.Len()))
	if _, err := unpack(t.Context(), bz); err == nil || !strings.Contains(err.Error(), "beyond the file") {
		t.Errorf("unpack of a cut file = %v", err)
	}
	got, err := unpack(t.Context(), append(bz, packed.Bytes()...))
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := compactELF(program(t)); !bytes.Equal(got, want) {
		t.Error("what is unpacked is not what was packed")
	}
	raw := []byte("an arm64 Image")
	if got, err := unpack(t.Context(), raw); err != nil || !bytes.Equal(got, raw) {
		t.Errorf("unpack of a plain image = %q, %v", got, err)
	}
}

func TestUnsign(t *testing.T) {
	ko := []byte("\x7fELF module")
	info := make([]byte, 12)
	info[11] = 9
	signed := append(append(append(bytes.Clone(ko), "signature"...), info...), "~Module signature appended~\n"...)
	if got := unsign(signed); !bytes.Equal(got, ko) {
		t.Errorf("unsign = %q, want %q", got, ko)
	}
	info[10] = 0xff
	wrong := append(append(bytes.Clone(ko), info...), "~Module signature appended~\n"...)
	for _, b := range [][]byte{ko, wrong, nil} {
		if got := unsign(b); !bytes.Equal(got, b) {
			t.Errorf("unsign(%q) = %q", b, got)
		}
	}
}
