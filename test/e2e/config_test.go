package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A container whose runtime options name a faulty configuration fails with
// what is wrong; nothing is left, as after every test.
func TestE2EConfigFaults(tt *testing.T) {
	once(tt, func(t *test) {
		needMachine(t)
		good := t.local.Config()
		for name, c := range map[string]struct{ text, want string }{
			"unknown key":    {good + "kernl = '/x'\n", `unknown key "machine.kernl"`},
			"missing kernel": {strings.ReplaceAll(good, t.local.Kernel(), "/no/such/vmlinux"), "/no/such/vmlinux"},
			"missing image":  {strings.ReplaceAll(good, t.local.Initrd(), "/no/such/initrd"), "/no/such/initrd"},
			"missing QEMU":   {good + "[qemu]\npath = '/no/such/qemu'\n", "/no/such/qemu"},
			"wrong QEMU":     {good + "[qemu]\npath = '/bin/true'\n", "/bin/true"},
			"no virtiofsd":   {good + "[qemu]\nvirtiofsd = '/no/such/virtiofsd'\n", "/no/such/virtiofsd"},
		} {
			file := filepath.Join(t.TempDir(), "vmshim.toml")
			write(t, file, c.text)
			r := t.try("", runArgs([]string{"--rm", "--runtime-config-path", file}, t.id(strings.ReplaceAll(name, " ", "")), "true")...)
			if r.code == 0 || !strings.Contains(r.stderr, c.want) {
				t.Errorf("%s: exit code %d, stderr %q: want %q in it", name, r.code, r.stderr, c.want)
			}
		}
	})
}

func TestE2EAnnotations(tt *testing.T) {
	once(tt, func(t *test) {
		needMachine(t)
		r := t.try("", runArgs([]string{"--rm", "--annotation", "io.vmshim.vcpus=2", "--annotation", "io.vmshim.kernel_params=vmshim.test=1"}, t.id("allowed"), "sh", "-c", "nproc; cat /proc/cmdline")...)
		if !strings.HasPrefix(r.stdout, "2\n") || !strings.Contains(r.stdout, "vmshim.test=1") {
			t.Errorf("%+v", r)
		}
		r = t.try("", runArgs([]string{"--rm", "--annotation", "io.vmshim.memory_mib=128"}, t.id("denied"), "true")...)
		if r.code == 0 || !strings.Contains(r.stderr, "io.vmshim.memory_mib") {
			t.Errorf("an annotation that is not allowed: exit code %d, stderr %q", r.code, r.stderr)
		}
	})
}

func TestE2EKernelPanics(tt *testing.T) {
	once(tt, func(t *test) {
		needMachine(t)
		r := t.try("", runArgs([]string{"--rm", "--annotation", "io.vmshim.kernel_params=rdinit=/no/such/init root=/dev/none"}, t.id(""), "true")...)
		if r.code == 0 || !strings.Contains(r.stderr, "panic") {
			t.Errorf("exit code %d, stderr %q: want the kernel's own words", r.code, r.stderr)
		}
	})
}

// The snippets that are shipped are understood by the daemons they are for.
func TestE2ESnippets(tt *testing.T) {
	for generation, snippet := range map[string]string{"debian": "containerd-v2.toml", "1": "containerd-v2.toml", "2": "containerd-v3.toml"} {
		tt.Run(generation, func(t *testing.T) {
			bin, err := exec.CommandContext(t.Context(), "../../hack/containerd", generation).Output()
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile("../../configs/" + snippet)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "config.toml")
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), filepath.Join(strings.TrimSpace(string(bin)), "containerd"), "--config", file, "config", "dump").CombinedOutput()
			if err != nil || !strings.Contains(string(out), ours) || !strings.Contains(string(out), "io.vmshim.*") {
				t.Errorf("config dump: %v\n%s", err, out)
			}
		})
	}
}
