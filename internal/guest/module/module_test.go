package module

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

const sample = `module dm_mod dm-mod.ko.xz
module xfs xfs.ko.xz libcrc32c
module libcrc32c libcrc32c.ko.xz
module virtio_net virtio_net.ko.xz failover net_failover
alias fs-xfs xfs
alias virtio:d00000001v* virtio_net
alias virtio:d*v* dm_mod
alias crypto-crc32c gone
builtin ext4
builtin virtio_pci
`

func TestLookup(t *testing.T) {
	index, err := Parse(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		want []string
	}{
		{"xfs", []string{"xfs"}},
		{"dm-mod", []string{"dm_mod"}},
		{"fs-xfs", []string{"xfs"}},
		{"virtio:d00000001v00001AF4", []string{"virtio_net", "dm_mod"}},
		{"virtio:d00000002v00001AF4", []string{"dm_mod"}},
		{"crypto-crc32c", nil},
		{"fs-ntfs", nil},
		{"", nil},
	} {
		found, err := index.Lookup(tt.name)
		var got []string
		for _, m := range found {
			got = append(got, m.Name)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("Lookup(%q) (-want +got):\n%s", tt.name, diff)
		}
		if errdefs.IsNotFound(err) != (tt.want == nil) {
			t.Errorf("Lookup(%q) = %v", tt.name, err)
		}
	}
}

func TestIndexRoundTrip(t *testing.T) {
	want, err := Parse(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	if _, err := want.WriteTo(&text); err != nil {
		t.Fatal(err)
	}
	got, err := Parse(strings.NewReader(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, line := range []string{"module xfs", "alias a", "alias a b c", "softdep x"} {
		if _, err := Parse(strings.NewReader("\n" + line)); err == nil || !strings.Contains(err.Error(), "line 2") {
			t.Errorf("Parse(%q) = %v, want an error with the line", line, err)
		}
	}
}

// What is built in is there: nothing is loaded for it.
func TestBuiltin(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, IndexName), []byte(sample), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ext4", "virtio-pci"} {
		if err := New(dir).Load(name, "option=1"); err != nil {
			t.Errorf("Load(%q) = %v", name, err)
		}
	}
	if err := New(dir).Load("xt_NAT", ""); !errdefs.IsNotFound(err) {
		t.Errorf("Load = %v, want not found", err)
	}
}

// A directory without list and index, or none at all.
func TestNoModules(t *testing.T) {
	l := New(t.TempDir())
	if err := l.LoadBoot(); err != nil {
		t.Errorf("LoadBoot = %v", err)
	}
	if err := l.Load("xfs", ""); !errdefs.IsNotFound(err) {
		t.Errorf("Load = %v, want not found", err)
	}
}

func TestLoadMissingFile(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{IndexName: sample, BootName: "a.ko\nb.ko\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l := New(dir)
	if err := l.LoadBoot(); err == nil || !strings.Contains(err.Error(), "a.ko") || !strings.Contains(err.Error(), "b.ko") {
		t.Errorf("LoadBoot = %v, want both files in it", err)
	}
	if err := l.Load("fs-xfs", ""); err == nil || !strings.Contains(err.Error(), "load module xfs: ") || !strings.Contains(err.Error(), "libcrc32c.ko.xz") {
		t.Errorf("Load = %v, want the module and the file in it", err)
	}
}
