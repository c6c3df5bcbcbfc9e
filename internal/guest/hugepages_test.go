package guest

import (
	"os"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

func TestParseHugePages(t *testing.T) {
	for _, tt := range []struct {
		options []string
		size    uint64
		count   uint64
		want    []string
	}{
		{[]string{"pagesize=2M,size=4194304"}, 2 << 20, 2, []string{"pagesize=2097152", "size=4194304"}},
		{[]string{"mode=0770", "pagesize=1Gi", "size=1073741825"}, 1 << 30, 2, []string{"mode=0770", "pagesize=1073741824", "size=1073741825"}},
		{[]string{"pagesize=2048k", "size=1"}, 2 << 20, 1, []string{"pagesize=2097152", "size=1"}},
	} {
		p, err := parseHugePages(tt.options)
		if err != nil || p.pageSize != tt.size || p.count != tt.count || !slices.Equal(p.options, tt.want) {
			t.Errorf("%q: %+v, %v", tt.options, p, err)
		}
	}
	for _, bad := range [][]string{
		nil,
		{"pagesize=2M"},
		{"size=2M"},
		{"pagesize=0,size=1"},
		{"pagesize=2M,size=0"},
		{"pagesize=-1,size=1"},
		{"pagesize=,size=1"},
		{"pagesize=2T,size=1"},
		{"pagesize=99999999999G,size=1"},
		{"pagesize=i,size=1"},
	} {
		if p, err := parseHugePages(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %+v, %v", bad, p, err)
		}
	}
}

func TestAllocateHugePages(t *testing.T) {
	d := testDevices(t)
	s := newStorages(Config{Root: t.TempDir()}, d)
	p := hugePages{pageSize: 2 << 20, count: 3}
	if err := s.allocate(t.Context(), p); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pages that the kernel does not have: %v", err)
	}
	d.put(t, map[string]string{"kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "5\n"})
	file := d.sys + "/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
	has := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(file); err != nil || string(b) != want {
			t.Errorf("%q, %v, want %s", b, err, want)
		}
	}
	if err := s.allocate(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	has("8")
	if err := s.free(p); err != nil {
		t.Fatal(err)
	}
	has("5")
	// A kernel that has no memory for them takes fewer.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/sys/vm/nr_hugepages", file); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p.count = 1 << 30
	if err := s.allocate(t.Context(), p); !errdefs.IsResourceExhausted(err) {
		t.Errorf("got %v", err)
	}
	has(string(before))
}
