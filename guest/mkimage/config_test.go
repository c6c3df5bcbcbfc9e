package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What the build of a kernel is checked with finds every option that is not
// what it was asked to be.
func TestCheckConfig(t *testing.T) {
	const asked = "# why\nCONFIG_ON=y\nCONFIG_OFF=n\nCONFIG_TEXT=\"a=b\"\nCONFIG_NR=256\n"
	const fine = "CONFIG_ON=y\n# CONFIG_OFF is not set\nCONFIG_TEXT=\"a=b\"\nCONFIG_NR=256\nCONFIG_MORE=y\n"
	for _, tt := range []struct{ name, got, want string }{
		{"all is as asked", fine, ""},
		{"a switch without its line", strings.ReplaceAll(fine, "# CONFIG_OFF is not set\n", ""), ""},
		{"dropped", strings.ReplaceAll(fine, "CONFIG_ON=y\n", ""), "CONFIG_ON=y, got n"},
		{"not set", strings.ReplaceAll(fine, "CONFIG_ON=y", "# CONFIG_ON is not set"), "CONFIG_ON=y, got n"},
		{"a module", strings.ReplaceAll(fine, "CONFIG_ON=y", "CONFIG_ON=m"), "CONFIG_ON=y, got m"},
		{"selected", strings.ReplaceAll(fine, "# CONFIG_OFF is not set", "CONFIG_OFF=y"), "CONFIG_OFF=n, got y"},
		{"another text", strings.ReplaceAll(fine, "a=b", "a=c"), `CONFIG_TEXT="a=b", got "a=c"`},
		{"another number", strings.ReplaceAll(fine, "256", "64"), "CONFIG_NR=256, got 64"},
		{"nothing", "", "CONFIG_ON=y, got n"},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{"asked": asked, "got": tt.got} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		out, err := exec.CommandContext(t.Context(), "../checkconfig", filepath.Join(dir, "asked"), filepath.Join(dir, "got")).CombinedOutput()
		if (err != nil) != (tt.want != "") || !strings.Contains(string(out), tt.want) {
			t.Errorf("%s: %v, %q, want %q", tt.name, err, out, tt.want)
		}
	}
}

// What Kconfig does not understand, it takes for nothing said; of two lines for
// an option it takes the last.
func TestShippedConfigs(t *testing.T) {
	option := regexp.MustCompile(`^CONFIG_[A-Z0-9_]+=(y|n|[0-9]+|"[^"]*")$`)
	for _, arch := range []string{"amd64", "arm64"} {
		seen := map[string]bool{}
		for _, file := range []string{"../kernel.config", "../kernel-" + arch + ".config"} {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for n, line := range strings.Split(string(text), "\n") {
				if line == "" || strings.HasPrefix(line, "# ") {
					continue
				}
				name, _, _ := strings.Cut(line, "=")
				if !option.MatchString(line) || seen[name] {
					t.Errorf("%s:%d: %q (said before: %v)", file, n+1, line, seen[name])
				}
				seen[name] = true
			}
		}
	}
}
