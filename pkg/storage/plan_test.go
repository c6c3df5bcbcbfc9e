package storage

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

var facts = Facts{
	Share: "/share",
	Modes: map[string]fs.FileMode{
		"/data":          fs.ModeDir | 0o755,
		"/etc/hosts":     0o644,
		"/tree":          fs.ModeDir | 0o755,
		"/bundle/rel":    fs.ModeDir | 0o755,
		"/bundle/rootfs": fs.ModeDir | 0o755,
		"/dev/shm/x":     fs.ModeDir | 0o755,
		"/run/sock":      fs.ModeSocket | 0o600,
		"/srv/disk":      fs.ModeDevice | 0o600,
		"/srv/tty":       fs.ModeDevice | fs.ModeCharDevice | 0o600,
	},
	Submounts: map[string]bool{"/tree": true},
	Setattr:   true,
}

func TestPlanMount(t *testing.T) {
	const shared = GuestDir + "/c1/0"
	for _, tt := range []struct {
		name  string
		in    specs.Mount
		guest specs.Mount // Destination is in's
		bind  *Bind
		file  bool
		host  *Mount
		warn  string
	}{{
		name:  "kernel file system",
		in:    specs.Mount{Type: "proc", Source: "proc", Options: []string{"nosuid"}},
		guest: specs.Mount{Type: "proc", Source: "proc", Options: []string{"nosuid"}},
	}, {
		name:  "control group of any version",
		in:    specs.Mount{Type: "cgroup2", Source: "cgroup2", Options: []string{"ro"}},
		guest: specs.Mount{Type: "cgroup", Source: "cgroup", Options: []string{"ro"}},
	}, {
		name:  "directory",
		in:    specs.Mount{Type: "bind", Source: "/data", Options: []string{"rbind", "rw"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"rbind", "rw"}},
		bind:  &Bind{Source: "/data", Recursive: true},
	}, {
		name:  "read-only without what is mounted below",
		in:    specs.Mount{Type: "bind", Source: "/tree", Options: []string{"rbind", "ro"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"rbind"}},
		bind:  &Bind{Source: "/tree", Recursive: true, ReadOnly: true},
	}, {
		name:  "all of it read-only",
		in:    specs.Mount{Type: "bind", Source: "/tree", Options: []string{"rbind", "ro", "rro"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"rbind", "ro", "rro"}},
		bind:  &Bind{Source: "/tree", Recursive: true, ReadOnly: true, RecursiveReadOnly: true},
	}, {
		name:  "without a type",
		in:    specs.Mount{Source: "/data", Options: []string{"bind"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"bind"}},
		bind:  &Bind{Source: "/data"},
	}, {
		name:  "file, read-only",
		in:    specs.Mount{Type: "bind", Source: "/etc/hosts", Options: []string{"bind", "rw", "ro"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"bind", "rw", "ro"}},
		bind:  &Bind{Source: "/etc/hosts", ReadOnly: true},
		file:  true,
	}, {
		name:  "relative to the bundle",
		in:    specs.Mount{Type: "bind", Source: "rel/", Options: []string{"bind", "ro", "rw"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"bind", "ro", "rw"}},
		bind:  &Bind{Source: "/bundle/rel"},
	}, {
		name:  "read-only with what is below",
		in:    specs.Mount{Type: "bind", Source: "/data", Options: []string{"rbind", "rro"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"rbind", "rro"}},
		bind:  &Bind{Source: "/data", Recursive: true, RecursiveReadOnly: true},
	}, {
		name:  "private",
		in:    specs.Mount{Type: "bind", Source: "/data", Options: []string{"rbind", "rprivate"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"rbind", "rprivate"}},
		bind:  &Bind{Source: "/data", Recursive: true},
	}, {
		name:  "from host to container",
		in:    specs.Mount{Type: "bind", Source: "/data", Options: []string{"rbind", "rslave"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"rbind", "rslave"}},
		bind:  &Bind{Source: "/data", Recursive: true, Slave: true},
	}, {
		name:  "shared memory of a pod",
		in:    specs.Mount{Destination: "/dev/shm/", Type: "bind", Source: "/run/pod/shm", Options: []string{"rbind"}},
		guest: specs.Mount{Type: "bind", Source: GuestShm, Options: []string{"rbind"}},
	}, {
		name:  "files in the host's shared memory",
		in:    specs.Mount{Type: "bind", Source: "/dev/shm/x", Options: []string{"rbind"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"rbind"}},
		bind:  &Bind{Source: "/dev/shm/x", Recursive: true},
	}, {
		name:  "the kernel's",
		in:    specs.Mount{Type: "bind", Source: "/sys/fs/../fs/bpf", Options: []string{"rbind"}},
		guest: specs.Mount{Type: "bind", Source: "/sys/fs/bpf", Options: []string{"rbind"}},
		warn:  "/sys/fs/bpf",
	}, {
		name:  "socket",
		in:    specs.Mount{Type: "bind", Source: "/run/sock", Options: []string{"bind"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"bind"}},
		bind:  &Bind{Source: "/run/sock"},
		file:  true,
		warn:  "/run/sock",
	}, {
		name:  "file system of the host",
		in:    specs.Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b", "ro", "nodev", "rprivate"}},
		guest: specs.Mount{Type: "bind", Source: shared, Options: []string{"ro", "nodev", "rbind"}},
		host:  &Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b", "ro", "nodev"}},
	}} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.in.Destination == "" {
				tt.in.Destination = "/there"
			}
			tt.guest.Destination = tt.in.Destination
			c := Container{
				ID: "c1", Bundle: "/bundle", Root: &specs.Root{Path: "rootfs"},
				Mounts: []specs.Mount{tt.in},
			}
			p, err := NewPlan(c, facts)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]specs.Mount{tt.guest}, p.Mounts); diff != "" {
				t.Errorf("in the guest (-want +got):\n%s", diff)
			}
			want := []HostMount{{Name: "rootfs", Bind: &Bind{Source: "/bundle/rootfs", Recursive: true}}}
			if tt.bind != nil {
				want = append(want, HostMount{Name: "0", File: tt.file, Bind: tt.bind})
			}
			if tt.host != nil {
				want = append(want, HostMount{Name: "0", Mounts: []Mount{*tt.host}})
			}
			if diff := cmp.Diff(want, p.Host); diff != "" {
				t.Errorf("on the host (-want +got):\n%s", diff)
			}
			if warned := strings.Join(p.Warnings, "\n"); (tt.warn != "") != (warned != "") || !strings.Contains(warned, tt.warn) {
				t.Errorf("warned %q, want %q", warned, tt.warn)
			}
		})
	}
}

func TestPlanRefuses(t *testing.T) {
	bind := func(source string, options ...string) specs.Mount {
		return specs.Mount{Destination: "/there", Type: "bind", Source: source, Options: append(options, "rbind")}
	}
	for _, tt := range []struct {
		name  string
		id    string
		root  *specs.Root
		mount specs.Mount
		old   bool
		want  error
	}{
		{name: "bad id", id: "../x", want: errdefs.ErrInvalidArgument},
		{name: "dots", id: "..", want: errdefs.ErrInvalidArgument},
		{name: "no root", root: &specs.Root{}, want: errdefs.ErrInvalidArgument},
		{name: "missing root", root: &specs.Root{Path: "nowhere"}, want: errdefs.ErrNotFound},
		{name: "root is a file", root: &specs.Root{Path: "/etc/hosts"}, want: errdefs.ErrInvalidArgument},
		{name: "missing source", mount: bind("/nowhere"), want: errdefs.ErrNotFound},
		{name: "block device", mount: bind("/srv/disk"), want: errdefs.ErrNotImplemented},
		{name: "character device", mount: bind("/srv/tty"), want: errdefs.ErrNotImplemented},
		{name: "shared", mount: bind("/data", "shared"), want: errdefs.ErrNotImplemented},
		{name: "rshared", mount: bind("/data", "rprivate", "rshared"), want: errdefs.ErrNotImplemented},
		{name: "id-mapped", mount: bind("/data", "ridmap"), want: errdefs.ErrNotImplemented},
		{name: "id mappings", mount: specs.Mount{Type: "bind", Source: "/data", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}}, want: errdefs.ErrNotImplemented},
		{name: "rro of an old kernel", mount: bind("/data", "rro"), old: true, want: errdefs.ErrNotImplemented},
		{name: "no type", mount: specs.Mount{Destination: "/there", Source: "/data"}, want: errdefs.ErrInvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := Container{ID: "c1", Bundle: "/bundle", Root: &specs.Root{Path: "rootfs"}}
			if tt.id != "" {
				c.ID = tt.id
			}
			if tt.root != nil {
				c.Root = tt.root
			}
			if tt.mount.Source != "" {
				c.Mounts = []specs.Mount{tt.mount}
			}
			f := facts
			f.Setattr = !tt.old
			if _, err := NewPlan(c, f); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

func TestPlanRootfs(t *testing.T) {
	mounts := []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a"}}}
	p, err := NewPlan(Container{ID: "c1", Rootfs: mounts}, facts)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]HostMount{{Name: "rootfs", Mounts: mounts}}, p.Host); diff != "" {
		t.Error(diff)
	}
	if want := GuestDir + "/c1/rootfs"; p.Root != want {
		t.Errorf("root %q, want %q", p.Root, want)
	}
	if want := filepath.Join(facts.Share, "c1"); p.Dir != want {
		t.Errorf("dir %q, want %q", p.Dir, want)
	}
}

func TestPlanWatched(t *testing.T) {
	const source = "/var/lib/kubelet/pods/x/volumes/kubernetes.io~configmap/c"
	f := facts
	f.Modes = map[string]fs.FileMode{source: fs.ModeDir | 0o755, "/bundle/rootfs": fs.ModeDir | 0o755}
	p, err := NewPlan(Container{
		ID: "c1", Bundle: "/bundle", Root: &specs.Root{Path: "rootfs"},
		Mounts: []specs.Mount{{Type: "bind", Source: source, Destination: "/config", Options: []string{"rbind", "ro"}}},
	}, f)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Storages) != 1 || p.Storages[0].GetDriver() != "watchable-bind" || p.Storages[0].GetSource() != GuestDir+"/c1/0" {
		t.Fatalf("storages %v", p.Storages)
	}
	want := []specs.Mount{{
		Type: "bind", Source: p.Storages[0].GetMountPoint(), Destination: "/config", Options: []string{"rbind", "ro"},
	}}
	if d := cmp.Diff(want, p.Mounts); d != "" {
		t.Error(d)
	}
	if len(p.Host) != 2 || p.Host[1].Bind.Source != source {
		t.Errorf("on the host %+v", p.Host)
	}
}

// Containers that have one volume of huge pages on the host have one in the guest.
func TestPlanHugePages(t *testing.T) {
	f := facts
	f.HugePages = map[string]uint64{"/data": 2 << 20}
	plan := func(id string, limits ...specs.LinuxHugepageLimit) (*Plan, error) {
		return NewPlan(Container{
			ID: id, Bundle: "/bundle", Root: &specs.Root{Path: "rootfs"}, HugePages: limits,
			Mounts: []specs.Mount{{Type: "bind", Source: "/data", Destination: "/huge", Options: []string{"rbind"}}},
		}, f)
	}
	var volumes []string
	for _, id := range []string{"a", "b"} {
		p, err := plan(id, specs.LinuxHugepageLimit{Pagesize: "1GB", Limit: 1 << 30}, specs.LinuxHugepageLimit{Pagesize: "2MB", Limit: 8 << 20})
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Host) != 1 || len(p.Storages) != 1 || len(p.Mounts) != 1 {
			t.Fatalf("planned %+v", p)
		}
		s := p.Storages[0]
		if s.GetFstype() != "hugetlbfs" || !s.GetShared() || !slices.Equal(s.GetOptions(), []string{"pagesize=2097152", "size=8388608"}) {
			t.Errorf("storage %v", s)
		}
		if p.Mounts[0].Source != s.GetMountPoint() {
			t.Errorf("mount %+v of storage %v", p.Mounts[0], s)
		}
		volumes = append(volumes, s.GetMountPoint())
	}
	if volumes[0] != volumes[1] {
		t.Errorf("volumes %q", volumes)
	}
	for _, limit := range []specs.LinuxHugepageLimit{{Pagesize: "2MB"}, {Pagesize: "1GB", Limit: 1 << 30}, {Pagesize: "2 MB", Limit: 1}, {Limit: 1}} {
		if _, err := plan("c", limit); !errdefs.IsInvalidArgument(err) {
			t.Errorf("limit %+v: %v", limit, err)
		}
	}
}
