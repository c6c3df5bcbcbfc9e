package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmshim/vmshim/pkg/sandbox"
)

// podConfigType is the message that CRI sends as a sandbox's configuration.
const podConfigType = "runtime.v1.PodSandboxConfig"

// A podConfig is what CreateSandbox asks for.
type podConfig struct {
	config *runtimeapi.PodSandboxConfig
	netns  string
}

// newPodConfig checks what a machine can be. Without options it is a sandbox that
// nothing is known of.
func newPodConfig(options *anypb.Any, netns string) (*podConfig, error) {
	p := &podConfig{config: &runtimeapi.PodSandboxConfig{}, netns: netns}
	switch url := options.GetTypeUrl(); {
	case url == "":
	case strings.HasSuffix(url, podConfigType):
		var err error
		if strings.Contains(url, "json") || json.Valid(options.GetValue()) {
			err = json.Unmarshal(options.GetValue(), p.config)
		} else {
			err = proto.Unmarshal(options.GetValue(), p.config)
		}
		if err != nil {
			return nil, fmt.Errorf("decode pod configuration: %w: %w", errdefs.ErrInvalidArgument, err)
		}
	default:
		return nil, fmt.Errorf("sandbox options of type %q: %w", url, errdefs.ErrInvalidArgument)
	}
	ns := p.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if ns.GetNetwork() == runtimeapi.NamespaceMode_NODE || netns == "" {
		return nil, fmt.Errorf("the host's network namespace is out of a machine's reach: %w", errdefs.ErrInvalidArgument)
	}
	return p, nil
}

// spec is the specification of the container that would stand for the pod.
func (p *podConfig) spec() *specs.Spec {
	linux := p.config.GetLinux()
	spec := &specs.Spec{
		Version:     specs.Version,
		Process:     &specs.Process{Args: []string{"pause"}, Cwd: "/"},
		Root:        &specs.Root{},
		Hostname:    p.hostname(),
		Annotations: p.config.GetAnnotations(),
		Linux: &specs.Linux{
			Sysctl: linux.GetSysctls(),
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.NetworkNamespace, Path: p.netns},
				{Type: specs.PIDNamespace},
				{Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace},
				{Type: specs.MountNamespace},
			},
		},
	}
	if u := linux.GetSecurityContext().GetNamespaceOptions().GetUsernsOptions(); u != nil && u.GetMode() == runtimeapi.NamespaceMode_POD {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	}
	spec.Linux.CgroupsPath = cgroupIn(linux.GetCgroupParent())
	spec.Linux.Resources = podResources(linux.GetResources())
	return spec
}

// podResources are what the containers of a pod may use together. Its overhead is
// what the machine has without them.
func podResources(in *runtimeapi.LinuxContainerResources) *specs.LinuxResources {
	r := &specs.LinuxResources{}
	if n := in.GetMemoryLimitInBytes(); n != 0 {
		r.Memory = &specs.LinuxMemory{Limit: &n}
	}
	if quota, period := in.GetCpuQuota(), in.GetCpuPeriod(); quota != 0 && period > 0 {
		r.CPU = &specs.LinuxCPU{Quota: &quota, Period: new(uint64(period))}
	}
	return r
}

// updatedResources is the name of the extension of a sandbox with which CRI says
// that a pod's resources changed: containerd's own type, in JSON.
const updatedResources = "updated-resources"

// updateOf is what an update says of the pod's resources; nil: nothing.
func updateOf(r *sandboxapi.UpdateSandboxRequest) (*specs.LinuxResources, error) {
	told := len(r.GetFields()) == 0 || slices.ContainsFunc(r.GetFields(), func(f string) bool {
		return f == "extensions" || f == "extensions."+updatedResources
	})
	extension := r.GetSandbox().GetExtensions()[updatedResources]
	if !told || extension == nil {
		return nil, nil
	}
	update, err := decodeAny[struct {
		Resources *runtimeapi.LinuxContainerResources
	}](extension)
	if err != nil {
		return nil, err
	}
	return podResources(update.Resources), nil
}

// cgroupIn is the path of a group for the pod's machine in its parent, in the form
// of a specification. In systemd's the name must be unique on the host.
func cgroupIn(parent string) string {
	switch {
	case parent == "":
		return ""
	case strings.HasSuffix(parent, ".slice"):
		slice := path.Base(parent)
		return slice + ":vmshim:" + strings.TrimSuffix(slice, ".slice")
	}
	return path.Join(parent, "vmshim")
}

// hostname is the host's when the pod has none.
func (p *podConfig) hostname() string {
	if name := p.config.GetHostname(); name != "" {
		return name
	}
	name, _ := os.Hostname()
	return name
}

// files are those of /etc that a pod has of its own. The rest of them is as on
// the host, as containerd has it with a pause container.
func (p *podConfig) files() ([]sandbox.File, error) {
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	resolv, err := p.resolvConf()
	if err != nil {
		return nil, err
	}
	return []sandbox.File{
		{Destination: "/etc/hostname", Content: []byte(p.hostname() + "\n")},
		{Destination: "/etc/hosts", Content: hosts},
		{Destination: "/etc/resolv.conf", Content: resolv},
	}, nil
}

func (p *podConfig) resolvConf() ([]byte, error) {
	dns := p.config.GetDnsConfig()
	if dns == nil {
		b, err := os.ReadFile("/etc/resolv.conf")
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return b, err
	}
	var b strings.Builder
	if s := dns.GetSearches(); len(s) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s, " "))
	}
	for _, server := range dns.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if o := dns.GetOptions(); len(o) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(o, " "))
	}
	return []byte(b.String()), nil
}
