package main

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseWishes(t *testing.T) {
	got, err := parseWishes("# comment\n\nboot virtio_pci # first\noverlay\nxt_*\nptp_kvm?\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []wish{
		{boot: true, pattern: "virtio_pci"},
		{pattern: "overlay"},
		{pattern: "xt_*"},
		{pattern: "ptp_kvm", optional: true},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(wish{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, text := range []string{"two names", "later overlay", "[", "boot a b"} {
		if _, err := parseWishes(text); err == nil {
			t.Errorf("parseWishes(%q) is content", text)
		}
	}
}

func TestParseTools(t *testing.T) {
	got, err := parseTools("iptables\t/sbin/x\ta b # names\nxfsprogs /usr/sbin/xfs_growfs\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []tool{
		{pkg: "iptables", pattern: "usr/sbin/x", links: []string{"a", "b"}},
		{pkg: "xfsprogs", pattern: "usr/sbin/xfs_growfs", links: []string{}},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(tool{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, text := range []string{"iptables", "iptables sbin/x"} {
		if _, err := parseTools(text); err == nil {
			t.Errorf("parseTools(%q) is content", text)
		}
	}
}

// The lists that come with the program are well formed.
func TestShippedLists(t *testing.T) {
	for name, parse := range map[string]func(string) (int, error){
		"../modules.txt": func(s string) (int, error) { w, err := parseWishes(s); return len(w), err },
		"../tools.txt":   func(s string) (int, error) { w, err := parseTools(s); return len(w), err },
	} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := parse(string(text)); err != nil || n == 0 {
			t.Errorf("%s: %d entries, %v", name, n, err)
		}
	}
}
