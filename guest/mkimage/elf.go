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
		if elf.ProgType(p.Type) != elf.PT_LOAD {
			continue
		}
		data := bytes.TrimRight(b[p.Off:p.Off+p.Filesz], "\x00")
		p.Off, p.Filesz, p.Align = uint64(len(out)), uint64(len(data)), 1
		out = append(out, data...)
		progs[i] = p
	}
	for i, p := range progs { // the note that says where PVH enters is in a LOAD segment
		if elf.ProgType(p.Type) != elf.PT_NOTE {
			continue
		}
		for j, q := range progs {
			if elf.ProgType(q.Type) == elf.PT_LOAD && p.Vaddr >= q.Vaddr && p.Vaddr+p.Filesz <= q.Vaddr+q.Filesz {
				progs[i].Off = progs[j].Off + p.Vaddr - q.Vaddr
			}
		}
	}
	if _, err := binary.Encode(out, binary.LittleEndian, h); err != nil {
		return nil, err
	}
	_, err := binary.Encode(out[h.Phoff:], binary.LittleEndian, progs)
	return out, err
}
