package sandbox

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// pauseBase is where the program is loaded: the usual place of a static one.
const pauseBase = 0x400000

// pauseComm is the program's name in ps; the kernel would take the number of
// its file.
const pauseComm = "vmshim-anchor\x00"

// pauseProgram writes the program that an anchor becomes to a file in memory.
func pauseProgram() (fd int, err error) {
	code, err := pauseELF(runtime.GOARCH)
	if err != nil {
		return -1, err
	}
	fd, err = unix.MemfdCreate("anchor", unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("anchor", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	if _, err := unix.Write(fd, code); err != nil {
		return -1, errors.Join(os.NewSyscallError("write", err), unix.Close(fd))
	}
	return fd, nil
}

// pauseELF is an executable that sets its name and pauses for ever: a header,
// one segment, a few instructions. Signals do what they do by default.
func pauseELF(arch string) ([]byte, error) {
	const headers = 64 + 56
	name := uint32(pauseBase + headers) // the name comes before the code
	var machine elf.Machine
	var code []byte
	switch arch {
	case "amd64":
		machine, code = elf.EM_X86_64, pauseAMD64(name)
	case "arm64":
		machine, code = elf.EM_AARCH64, pauseARM64(name)
	default:
		return nil, fmt.Errorf("no task process for %s", arch)
	}
	gap := -len(pauseComm) & 3 // instructions of arm64 are aligned
	body := append(append([]byte(pauseComm), make([]byte, gap)...), code...)
	size := uint64(headers + len(body))
	var b bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{
				0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT),
			},
			Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT),
			Entry: uint64(pauseBase + headers + len(pauseComm) + gap),
			Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X),
			Vaddr: pauseBase, Paddr: pauseBase, Filesz: size, Memsz: size, Align: 0x1000,
		},
		body,
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

func pauseAMD64(name uint32) []byte {
	code := []byte{0xb8, 157, 0, 0, 0} // mov eax, prctl
	code = append(code, 0xbf, unix.PR_SET_NAME, 0, 0, 0)
	code = append(code, 0xbe) // mov esi, name
	code = binary.LittleEndian.AppendUint32(code, name)
	code = append(code, 0x0f, 0x05) // syscall
	return append(code,
		0xb8, 34, 0, 0, 0, // loop: mov eax, pause
		0x0f, 0x05, // syscall
		0xeb, 0xf7, // jmp loop
	)
}

// pauseARM64 uses ppoll without files and timeout: there is no pause.
func pauseARM64(name uint32) []byte {
	movz := func(reg, value, shift uint32) uint32 { return 0xd2800000 | shift/16<<21 | value<<5 | reg }
	const svc = 0xd4000001
	var code []byte
	for _, op := range []uint32{
		movz(0, unix.PR_SET_NAME, 0),
		movz(1, name>>16, 16), 0xf2800001 | name&0xffff<<5, // movk x1
		movz(8, 167, 0), // prctl
		svc,
		movz(0, 0, 0), movz(1, 0, 0), // loop
		movz(2, 0, 0), movz(3, 0, 0),
		movz(8, 73, 0), // ppoll
		svc,
		0x14000000 | -6&0x3ffffff, // b loop
	} {
		code = binary.LittleEndian.AppendUint32(code, op)
	}
	return code
}
