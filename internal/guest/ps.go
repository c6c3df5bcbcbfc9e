package guest

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// maxCommand bounds the command of a process in answers.
const maxCommand = 1024

// describeProcess adds what proc says of a process that may just end.
func describeProcess(info *extension.ProcessInfo, proc string) {
	dir := filepath.Join(proc, strconv.FormatUint(uint64(info.GetPid()), 10))
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return
	}
	name := ""
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		fields := strings.Fields(value)
		switch {
		case key == "Name":
			name = strings.TrimSpace(value)
		case key == "PPid" && len(fields) == 1:
			info.ParentPid = number(fields[0])
		case key == "Uid" && len(fields) == 4: // real, effective, saved, of the file system
			info.Uid = number(fields[1])
		}
	}
	args, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
	args = bytes.ReplaceAll(bytes.TrimRight(args, "\x00"), []byte{0}, []byte{' '})
	info.Command = bound(strings.ToValidUTF8(string(args), "?"), maxCommand)
	if len(args) == 0 {
		info.Command = "[" + bound(strings.ToValidUTF8(name, "?"), maxCommand-2) + "]"
	}
}

func number(s string) uint32 {
	n, _ := strconv.ParseUint(s, 10, 32)
	return uint32(n)
}
