package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
)

// compactELF keeps what a loader needs of a kernel: its segments, one behind
// the other and without the zeros at their ends, which loading adds again.
// QEMU reads the file for every machine it starts: less to read, less to keep.
func compactELF(b []byte) ([]byte, error) {
	var h elf.Header64
	if _, err := binary.Decode(b, binary.LittleEndian, &h); err != nil || !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		return nil, errors.New("not an ELF file")
	}
	progs := make([]elf.Prog64, h.Phnum)
	if h.Phoff > uint64(len(b)) {
		return nil, errors.New("no program headers")
	}
	if _, err := binary.Decode(b[h.Phoff:], binary.LittleEndian, progs); err != nil {
		return nil, fmt.Errorf("program headers: %w", err)
	}
	h.Phoff = uint64(binary.Size(h))
	h.Shoff, h.Shnum, h.Shstrndx = 0, 0, 0
	out := make([]byte, int(h.Phoff)+binary.Size(progs), len(b))
	for i, p := range progs {
		if p.Off > uint64(len(b)) || p.Filesz > uint64(len(b))-p.Off {
			return nil, fmt.Errorf("segment %d ends beyond the file", i)
		}
		data := b[p.Off : p.Off+p.Filesz]
		switch elf.ProgType(p.Type) {
		case elf.PT_LOAD:
			data, p.Align = bytes.TrimRight(data, "\x00"), 1
		case elf.PT_NOTE: // says where PVH enters; whole, though part of a LOAD segment that may end in it
		default:
			continue
		}
		p.Off, p.Filesz = uint64(len(out)), uint64(len(data))
		out = append(out, data...)
		progs[i] = p
	}
	if _, err := binary.Encode(out, binary.LittleEndian, h); err != nil {
		return nil, err
	}
	_, err := binary.Encode(out[h.Phoff:], binary.LittleEndian, progs)
	return out, err
}
