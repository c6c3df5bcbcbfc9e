package shim

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func podOptions(t *testing.T, c *runtimeapi.PodSandboxConfig) *anypb.Any {
	t.Helper()
	b, err := proto.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: podConfigType, Value: b}
}

func TestPodConfig(t *testing.T) {
	c, err := newPodConfig(podOptions(t, &runtimeapi.PodSandboxConfig{
		Hostname:  "name",
		DnsConfig: &runtimeapi.DNSConfig{Servers: []string{"10.0.0.1", "fd00::1"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5"}},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/pod1",
			Sysctls:      map[string]string{"net.a": "1"},
			Resources:    &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, MemoryLimitInBytes: 1 << 28},
		},
	}), "/run/netns/x")
	if err != nil {
		t.Fatal(err)
	}
	spec := c.spec()
	if spec.Hostname != "name" || spec.Linux.Sysctl["net.a"] != "1" || spec.Linux.CgroupsPath != "/kubepods/pod1/vmshim" {
		t.Errorf("%+v, %+v", spec, spec.Linux)
	}
	if ns := spec.Linux.Namespaces[0]; ns.Type != "network" || ns.Path != "/run/netns/x" {
		t.Errorf("namespaces %+v", spec.Linux.Namespaces)
	}
	if *spec.Linux.Resources.Memory.Limit != 1<<28 || *spec.Linux.Resources.CPU.Quota != 150000 {
		t.Errorf("resources %+v", spec.Linux.Resources)
	}
	files, err := c.files()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, f := range files {
		got[f.Destination] = string(f.Content)
	}
	if got["/etc/hostname"] != "name\n" {
		t.Errorf("hostname %q", got["/etc/hostname"])
	}
	if want := "search a b\nnameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:5\n"; got["/etc/resolv.conf"] != want {
		t.Errorf("resolv.conf %q, want %q", got["/etc/resolv.conf"], want)
	}
	if _, ok := got["/etc/hosts"]; !ok {
		t.Error("no hosts")
	}
}

// TestPodConfigUserNamespace leaves the refusal to whoever reads the
// specification: a container's says the same.
func TestPodConfigUserNamespace(t *testing.T) {
	for mode, want := range map[runtimeapi.NamespaceMode]bool{runtimeapi.NamespaceMode_POD: true, runtimeapi.NamespaceMode_NODE: false} {
		c, err := newPodConfig(podOptions(t, &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: mode}},
			},
		}}), "/run/netns/x")
		if err != nil {
			t.Fatal(err)
		}
		got := slices.ContainsFunc(c.spec().Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UserNamespace })
		if got != want {
			t.Errorf("%s: user namespace %v, want %v", mode, got, want)
		}
	}
}

func TestPodConfigOfNothing(t *testing.T) {
	c, err := newPodConfig(nil, "/run/netns/x")
	if err != nil {
		t.Fatal(err)
	}
	if spec := c.spec(); spec.Hostname == "" || spec.Linux.CgroupsPath != "" {
		t.Errorf("%+v", spec)
	}
}

func TestCgroupIn(t *testing.T) {
	for parent, want := range map[string]string{
		"":                                    "",
		"/kubepods/pod1":                      "/kubepods/pod1/vmshim",
		"/kubepods.slice/kubepods-pod1.slice": "kubepods-pod1.slice:vmshim:kubepods-pod1",
	} {
		if got := cgroupIn(parent); got != want {
			t.Errorf("in %q: %q, want %q", parent, got, want)
		}
	}
}

func TestPodConfigRefused(t *testing.T) {
	node := &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
		SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
		},
	}}
	for name, tt := range map[string]struct {
		options *anypb.Any
		netns   string
		says    string
	}{
		"the host's network": {podOptions(t, node), "", "host's network"},
		"no network":         {nil, "", "host's network"},
		"another type":       {&anypb.Any{TypeUrl: "x.Y"}, "/n", "x.Y"},
		"damaged":            {&anypb.Any{TypeUrl: podConfigType, Value: []byte{0xff}}, "/n", "decode"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newPodConfig(tt.options, tt.netns)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestStandsForPod(t *testing.T) {
	for name, tt := range map[string]struct {
		annotations map[string]string
		stands      bool
		sandbox     string
	}{
		"nothing":              {nil, false, "c"},
		"containerd's pod":     {map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "c"}, true, "c"},
		"containerd's member":  {map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"}, false, "p"},
		"CRI-O's pod":          {map[string]string{"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.cri-o.SandboxID": "c"}, true, "c"},
		"CRI-O's member":       {map[string]string{"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "p"}, false, "p"},
		"a member of nothing":  {map[string]string{"io.kubernetes.cri.container-type": "container"}, false, "c"},
		"something in between": {map[string]string{"io.kubernetes.cri.container-type": "other"}, false, "c"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := standsForPod(tt.annotations); got != tt.stands {
				t.Errorf("stands for a pod: %v", got)
			}
			if got := sandboxOf(tt.annotations, "c"); got != tt.sandbox {
				t.Errorf("goes to %q, want %q", got, tt.sandbox)
			}
		})
	}
}
