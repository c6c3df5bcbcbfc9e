// Package pause has a program that does nothing for as long as it runs: some
// hundred bytes of machine code for where a process is needed, but nothing for
// it to do. It ignores the ends of its children, so that the kernel reaps them:
// it can be the first process of a pid namespace.
package pause

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	// base is where the program is loaded: the usual place of a static one.
	base = 0x400000
	// headers is the length of what comes before the body: those of a 64-bit ELF
	// file and of its only segment.
	headers = 64 + 56
	// maxName is what the kernel keeps of a name, and the zero behind it.
	maxName = 16
)

// Program is the executable for this machine. The name is what ps shows; 15
// bytes of it.
func Program(name string) ([]byte, error) { return program(runtime.GOARCH, name) }

// Open writes the program to a file in memory and returns its descriptor.
func Open(name string) (fd int, err error) {
	code, err := Program(name)
	if err != nil {
		return -1, err
	}
	fd, err = unix.MemfdCreate("pause", unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("pause", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	if _, err := unix.Write(fd, code); err != nil {
		return -1, errors.Join(os.NewSyscallError("write", err), unix.Close(fd))
	}
	return fd, nil
}

// program is the executable: headers, one segment with data and a few
// instructions.
func program(arch, name string) ([]byte, error) {
	// The name, and a struct sigaction of the kernel whose handler is SIG_IGN and
	// whose other fields are zero.
	data := make([]byte, maxName+32)
	copy(data[:maxName-1], name)
	data[maxName] = 1
	at := uint32(base + headers)
	var machine elf.Machine
	var code []byte
	switch arch {
	case "amd64":
		machine, code = elf.EM_X86_64, amd64(at, at+maxName)
	case "arm64":
		machine, code = elf.EM_AARCH64, arm64(at, at+maxName)
	default:
		return nil, fmt.Errorf("no pause program for %s", arch)
	}
	body := slices.Concat(data, code)
	size := uint64(headers + len(body))
	var b bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{
				0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT),
			},
			Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT),
			Entry: uint64(base + headers + len(data)),
			Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X),
			Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x1000,
		},
		body,
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

// sigsetSize is that of the kernel's sigset_t.
const sigsetSize = 8

func amd64(name, ignore uint32) []byte {
	code := []byte{0xb8, 157, 0, 0, 0} // mov eax, prctl
	code = append(code, 0xbf, unix.PR_SET_NAME, 0, 0, 0)
	code = append(code, 0xbe) // mov esi, name
	code = binary.LittleEndian.AppendUint32(code, name)
	code = append(code, 0x0f, 0x05) // syscall
	code = append(code,
		0xb8, 13, 0, 0, 0, // mov eax, rt_sigaction
		0xbf, byte(unix.SIGCHLD), 0, 0, 0, // mov edi
		0xbe) // mov esi, ignore
	code = binary.LittleEndian.AppendUint32(code, ignore)
	return append(code,
		0x31, 0xd2, // xor edx, edx
		0x41, 0xba, sigsetSize, 0, 0, 0, // mov r10d
		0x0f, 0x05, // syscall
		0xb8, 34, 0, 0, 0, // loop: mov eax, pause
		0x0f, 0x05, // syscall
		0xeb, 0xf7, // jmp loop
	)
}

// arm64 uses ppoll without files and timeout: there is no pause.
func arm64(name, ignore uint32) []byte {
	movz := func(reg, value, shift uint32) uint32 { return 0xd2800000 | shift/16<<21 | value<<5 | reg }
	movk := func(reg, value uint32) uint32 { return 0xf2800000 | value<<5 | reg }
	const svc = 0xd4000001
	var code []byte
	for _, op := range []uint32{
		movz(0, unix.PR_SET_NAME, 0),
		movz(1, name>>16, 16), movk(1, name&0xffff),
		movz(8, 167, 0), // prctl
		svc,
		movz(0, uint32(unix.SIGCHLD), 0),
		movz(1, ignore>>16, 16), movk(1, ignore&0xffff),
		movz(2, 0, 0), movz(3, sigsetSize, 0),
		movz(8, 134, 0), // rt_sigaction
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
