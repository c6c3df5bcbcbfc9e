package config

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
)

var commented = regexp.MustCompile(`(?m)^#([a-z_]+ = )`)

// The shipped file must show every key with the default that is in the code.
func TestShippedFileIsTheDefault(t *testing.T) {
	text, err := os.ReadFile("../../configs/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	shown := commented.ReplaceAll(text, []byte("$1"))
	for name, text := range map[string][]byte{"as shipped": text, "keys uncommented": shown} {
		f, _, err := decode(name, text, nil)
		if err != nil {
			t.Fatal(err)
		}
		want := defaults()
		want.Annotations, want.Machine.KernelParams = f.Annotations, f.Machine.KernelParams // nil or empty
		if diff := cmp.Diff(want, f); diff != "" || len(f.Annotations)+len(f.Machine.KernelParams) > 0 {
			t.Errorf("%s: -code +file:\n%s", name, diff)
		}
	}
	var tree map[string]any
	if err := toml.Unmarshal(shown, &tree); err != nil {
		t.Fatal(err)
	}
	for _, key := range keys(reflect.TypeFor[file](), "") {
		if !has(tree, strings.Split(key, ".")) {
			t.Errorf("configs/config.toml does not show %s", key)
		}
	}
}

func TestSettingsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	all := keys(reflect.TypeFor[file](), "")
	if len(all) > 25 {
		t.Errorf("%d settings, want at most 25", len(all))
	}
	for _, name := range append(all, annotationNames()...) {
		if !strings.Contains(string(text), "`"+name+"`") {
			t.Errorf("docs/configuration.md does not have `%s`", name)
		}
	}
}

func keys(t reflect.Type, prefix string) (all []string) {
	for f := range t.Fields() {
		key := prefix + f.Tag.Get("toml")
		if f.Type.Kind() == reflect.Struct {
			all = append(all, keys(f.Type, key+".")...)
			continue
		}
		all = append(all, key)
	}
	return all
}

func has(tree map[string]any, key []string) bool {
	v, ok := tree[key[0]]
	if len(key) == 1 || !ok {
		return ok
	}
	sub, ok := v.(map[string]any)
	return ok && has(sub, key[1:])
}

func TestParse(t *testing.T) {
	c, err := Parse("x.toml", []byte(`
debug = true
annotations = ["io.vmshim.vcpus"]
[machine]
kernel = "/k"
memory_mib = 512
[qemu]
accelerator = "tcg"
[timeouts]
start = "1m30s"
`))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Debug = true
	want.Annotations = []string{"io.vmshim.vcpus"}
	m := &want.Sandbox.Machine
	m.Kernel, m.MemoryMiB, m.MaxMemoryMiB = "/k", 512, 512
	m.Initrd = c.Sandbox.Machine.Initrd
	want.QEMU.Accelerator = "tcg"
	want.Sandbox.StartTimeout = 90 * time.Second
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if !strings.HasSuffix(m.Initrd, "/share/vmshim/initrd.img") {
		t.Errorf("initrd %q, want one beside the program", m.Initrd)
	}
}

func TestParseFaults(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"unknown key", "debug = true\n\n[qemu]\nacelerator = \"kvm\"\n", []string{`x.toml:4: unknown key "qemu.acelerator"`}},
		{"unknown keys", "a = 1\nb = 2\n", []string{`x.toml:1: unknown key "a"`, `x.toml:2: unknown key "b"`}},
		{"unknown table", "[gpu]\ncount = 1\n", []string{"x.toml:1:", `"gpu`}},
		{"wrong type", "\n[machine]\nvcpus = \"two\"\n", []string{"x.toml:3:"}},
		{"no TOML", "debug = true\n[machine\n", []string{"x.toml:2:"}},
		{"duration", "[timeouts]\nstart = \"soon\"\n", []string{"x.toml:2:", `"soon"`}},
		{"negative uid", "[qemu]\nuid_base = -1\n", []string{"x.toml:2:"}},
		{"all faults at once", "state_dir = \"run\"\ntemplate_dir = \"t\"\nmake_templates = \"often\"\nannotations = [\"io.vmshim.path\"]\n[machine]\nvcpus = 0\nmemory_mib = 1\nkernel = \"k\"\n[qemu]\npath = \"qemu\"\naccelerator = \"hvf\"\nuid_base = 4294967295\n[timeouts]\nstart = \"0s\"\n", []string{
			"x.toml: ", `state_dir "run"`, `template_dir "t"`, `make_templates "often"`, `"io.vmshim.path" names no setting`, "0 vCPUs", "1 MiB", `kernel "k"`,
			`qemu.path "qemu"`, `qemu.accelerator "hvf"`, "qemu.uid_base", "timeouts.start 0s",
		}},
		{"long state_dir", `state_dir = "/` + strings.Repeat("x", 80) + `"`, []string{"socket paths"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("x.toml", []byte(tt.text))
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q\nis without %q", err, want)
				}
			}
		})
	}
}

func TestRemovedKeyWarns(t *testing.T) {
	f, warnings, err := decode("x.toml", []byte("debug = true\n[qemu]\nbios = \"/b\"\n"), map[string]string{"qemu.bios": "none is needed"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"x.toml:3: qemu.bios has no effect any more: none is needed"}
	if diff := cmp.Diff(want, warnings); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if !f.Debug {
		t.Error("the other keys were not read")
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	named, byEnv := filepath.Join(dir, "named.toml"), filepath.Join(dir, "env.toml")
	for path, text := range map[string]string{named: "[machine]\nvcpus = 2\n", byEnv: "[machine]\nvcpus = 3\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(Env, byEnv)
	for path, want := range map[string]int{named: 2, "": 3} {
		c, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Sandbox.Machine.VCPUs; got != want {
			t.Errorf("Load(%q): %d vCPUs, want %d", path, got, want)
		}
	}
	t.Setenv(Env, filepath.Join(dir, "none.toml"))
	if _, err := Load(""); err == nil || !strings.Contains(err.Error(), "none.toml") {
		t.Errorf("a file that was asked for and is not there: %v", err)
	}
}

func TestAnnotate(t *testing.T) {
	base := Default()
	base.Annotations = annotationNames()
	base.Sandbox.Machine.KernelParams = []string{"a=1"}
	c, err := base.Annotate(map[string]string{
		"io.vmshim.kernel": "/k", "io.vmshim.initrd": "/i", "io.vmshim.kernel_params": "b=2  c",
		"io.vmshim.vcpus": "4", "io.vmshim.memory_mib": "1024", "io.vmshim.virtiofsd_cache": "never",
		"com.example.other": "x",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := base
	m := &want.Sandbox.Machine
	m.Kernel, m.Initrd, m.KernelParams = "/k", "/i", []string{"a=1", "b=2", "c"}
	m.VCPUs, m.MaxVCPUs, m.MemoryMiB, m.MaxMemoryMiB = 4, 4, 1024, 1024
	want.QEMU.VirtiofsdCache = "never"
	want.QEMU.MakeTemplates = "never"
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"a=1"}, base.Sandbox.Machine.KernelParams); diff != "" {
		t.Errorf("the base changed: %s", diff)
	}
}

func TestAnnotateRefuses(t *testing.T) {
	allowed := Default()
	allowed.Annotations = annotationNames()
	for _, tt := range []struct {
		name     string
		config   Config
		key      string
		value    string
		is       func(error) bool
		contains string
	}{
		{"not allowed", Default(), "io.vmshim.vcpus", "2", errdefs.IsPermissionDenied, "io.vmshim.vcpus"},
		{"no setting", allowed, "io.vmshim.path", "/bin/sh", errdefs.IsInvalidArgument, "io.vmshim.path"},
		{"no number", allowed, "io.vmshim.vcpus", "two", errdefs.IsInvalidArgument, `"two"`},
		{"out of range", allowed, "io.vmshim.memory_mib", "-5", errdefs.IsInvalidArgument, "-5 MiB"},
		{"relative path", allowed, "io.vmshim.kernel", "../k", errdefs.IsInvalidArgument, "../k"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := tt.config.Annotate(map[string]string{tt.key: tt.value})
			if err == nil || !tt.is(err) || !strings.Contains(err.Error(), tt.contains) {
				t.Errorf("error %v, want the other class or %q in it", err, tt.contains)
			}
		})
	}
}

// Containerd can send the text of a file: whatever it is, there is an answer.
func FuzzParse(f *testing.F) {
	shipped, err := os.ReadFile("../../configs/config.toml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(shipped)
	f.Add(commented.ReplaceAll(shipped, []byte("$1")))
	f.Add([]byte("[machine]\nvcpus = 2\nkernel_params = [\"a\", \"b\"]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("fuzz", text)
		if err == nil && c.Validate() != nil {
			t.Errorf("accepted, but not valid: %v", c.Validate())
		}
	})
}
