package arch

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/vmshim/vmshim"

// allowed lists, for each package tree, the project packages it may import.
// The longest matching prefix wins. A tree may always import itself.
var allowed = map[string][]string{
	"pkg/agent/protocol":  {},
	"pkg/hypervisor":      {},
	"pkg/hypervisor/qemu": {"internal/cleanup", "pkg/agent/protocol", "pkg/hypervisor", "pkg/vsock"},
	"pkg/vsock":           {},
	"pkg/agent":           {"internal/linger", "pkg/agent/protocol", "pkg/vsock"},
	"pkg/network":         {"internal/cleanup", "internal/rtnetlink", "internal/thread", "pkg/agent/protocol"},
	"pkg/storage":         {"pkg/agent/protocol", "pkg/hypervisor"},
	"pkg/sandbox":         {"pkg/agent/protocol", "internal/cleanup", "internal/pause", "pkg/agent", "pkg/hypervisor", "pkg/network", "pkg/storage"},
	"pkg/shim":            {"internal/version", "pkg/agent/protocol", "pkg/config", "pkg/sandbox"},
	"pkg/config":          {"pkg/hypervisor", "pkg/hypervisor/qemu", "pkg/network", "pkg/sandbox", "pkg/storage"},
	"internal/guest":      {"pkg/agent/protocol", "internal/cleanup", "internal/linger", "internal/pause", "internal/rtnetlink", "internal/thread", "internal/version", "pkg/vsock"},
	"internal/cleanup":    {},
	"internal/linger":     {},
	"internal/need":       {},
	"internal/pause":      {},
	"internal/rtnetlink":  {},
	"internal/thread":     {},
	"guest":               {"internal/guest"}, // the image has an index that the guest reads
	"internal/version":    {},
	"internal/cli":        {"internal/version", "pkg/agent/protocol", "pkg/agent", "pkg/config", "pkg/hypervisor/qemu", "pkg/network", "pkg/sandbox"},
	"internal/vmtest":     nil,
	"internal/arch":       {},
	"cmd":                 nil, // nil: anything
	"test":                nil,
	"test/agent/plain":    {}, // checks both ends of the protocol, with the code of neither
}

type pkg struct {
	ImportPath, Dir  string
	GoFiles, Imports []string
}

func load(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports", module+"/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func under(p, root string) bool { return p == root || strings.HasPrefix(p, root+"/") }

func rule(p string) (root string, to []string, ok bool) {
	for r, d := range allowed {
		if under(p, r) && len(r) > len(root) {
			root, to, ok = r, d, true
		}
	}
	return root, to, ok
}

func TestImportArrows(t *testing.T) {
	for _, p := range load(t) {
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		root, to, ok := rule(from)
		if !ok {
			t.Errorf("%s: no rule; add one to allowed and to ARCHITECTURE.md", from)
			continue
		}
		if to == nil {
			continue
		}
		for _, imp := range p.Imports {
			dep, ours := strings.CutPrefix(imp, module+"/")
			if !ours {
				continue
			}
			if droot, _, _ := rule(dep); droot != root && !slices.Contains(to, droot) {
				t.Errorf("%s imports %s; %s may import only %v", from, dep, root, to)
			}
		}
	}
}

func TestPackageDoc(t *testing.T) {
	for _, p := range load(t) {
		docs := 0
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil && !ast.IsGenerated(f) {
				docs++
			}
		}
		if docs != 1 && len(p.GoFiles) > 0 {
			t.Errorf("%s: %d package comments, want 1", p.ImportPath, docs)
		}
	}
}

// What calls methods by names made at run time makes the linker keep every
// exported method of every type: the shim grew by half. The tag is the Makefile's.
func TestShimWithoutTemplates(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-tags", "grpcnotrace", module+"/cmd/containerd-shim-vm-v2").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for _, dep := range []string{"text/template", "html/template"} {
		if slices.Contains(strings.Fields(string(out)), dep) {
			t.Errorf("the shim depends on %s", dep)
		}
	}
}
