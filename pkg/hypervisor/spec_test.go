package hypervisor

import (
	"strings"
	"testing"
)

func valid() Spec {
	return Spec{
		Name: "s", Arch: "arm64", VCPUs: 1, MaxVCPUs: 2, MemoryMiB: 64, MaxMemoryMiB: 64,
		Kernel: "/k", Initrd: "/i", KernelParams: []string{`dyndbg="file x +p"`},
		Shares: []Share{{Tag: "a", Dir: "/a"}, {Tag: strings.Repeat("b", 35), Dir: "/b"}},
		Disks:  []Disk{{ID: "a-0", Path: "/a"}, {ID: strings.Repeat("b", 20), Path: "/b"}},
	}
}

func TestValidate(t *testing.T) {
	if err := valid().Validate(); err != nil {
		t.Errorf("a good one: %v", err)
	}
	tests := []struct {
		name   string
		change func(*Spec)
		want   string
	}{
		{"no name", func(s *Spec) { s.Name = "" }, "name is empty"},
		{"architecture", func(s *Spec) { s.Arch = "x86_64" }, `"x86_64" is not amd64 or arm64`},
		{"no cpu", func(s *Spec) { s.VCPUs = 0 }, "0 vCPUs of at most 2"},
		{"fewer cpus at most", func(s *Spec) { s.MaxVCPUs = 0 }, "1 vCPUs of at most 0"},
		{"little memory", func(s *Spec) { s.MemoryMiB = 63 }, "63 MiB"},
		{"less memory at most", func(s *Spec) { s.MaxMemoryMiB = 63 }, "of at most 63"},
		{"memory slots", func(s *Spec) { s.MemorySlots = 257 }, "257 memory slots"},
		{"kernel", func(s *Spec) { s.Kernel = "k" }, `kernel "k"`},
		{"initrd", func(s *Spec) { s.Initrd = "" }, `initrd ""`},
		{"parameter of two lines", func(s *Spec) { s.KernelParams = []string{"a\nb"} }, `"a\nb"`},
		{"empty parameter", func(s *Spec) { s.KernelParams = []string{""} }, `kernel parameter ""`},
		{"tag twice", func(s *Spec) { s.Shares[1].Tag = "a" }, `tag "a"`},
		{"tag too long", func(s *Spec) { s.Shares[1].Tag += "b" }, "empty or long"},
		{"share of a relative directory", func(s *Spec) { s.Shares[0].Dir = "." }, `directory "."`},
		{"disk twice", func(s *Spec) { s.Disks[1].ID = "a-0" }, `disk id "a-0"`},
		{"disk too long", func(s *Spec) { s.Disks[1].ID += "b" }, "empty or long"},
		{"disk's letters", func(s *Spec) { s.Disks[0].ID = "a_0" }, `"a_0" has more than`},
		{"disk of a relative path", func(s *Spec) { s.Disks[0].Path = "d" }, `path "d"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := valid()
			tt.change(&s)
			if err := s.Validate(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v lacks %q", err, tt.want)
			}
		})
	}
	if err := (Spec{}).Validate(); strings.Count(err.Error(), "\n") < 5 {
		t.Errorf("not every fault is told: %v", err)
	}
}
