package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmshim/vmshim/test/daemon"
)

const bootID = "/proc/sys/kernel/random/boot_id"

func eachHandler(t *testing.T, f func(n *node)) {
	for _, handler := range []string{daemon.HandlerVM, daemon.HandlerSandbox} {
		if handler == daemon.HandlerSandbox && generation != "2" {
			continue
		}
		t.Run(handler, func(t *testing.T) { f(newNode(t, handler)) })
	}
}

// A pod is one machine. Its containers come and go, and share what a pod's do.
func TestE2EPod(t *testing.T) {
	eachHandler(t, func(n *node) {
		n.brokenNetwork()
		n.userNamespace()
		p := n.run("pod", func(c *runtimeapi.PodSandboxConfig) {
			c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"10.11.12.13"}, Searches: []string{"pods.test"}}
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77"}
		})
		volume, change := n.configMap()
		v := n.volumes()
		a := p.start("a", func(c *runtimeapi.ContainerConfig) {
			c.Mounts = append(v.mounts("a"), &runtimeapi.Mount{HostPath: volume, ContainerPath: "/config", Readonly: true})
		}, "sh", "-c", "echo hello; echo $(hostname) >&2; exec sleep 1000")
		if mib, want := n.memory(a), n.machineMiB(); mib >= want || mib < want-80 {
			n.Errorf("the guest has %d MiB; its handler's configuration says %d", mib, want)
		}
		b := p.start("b", func(c *runtimeapi.ContainerConfig) {
			c.Mounts = v.mounts("b")
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}
		}, "sleep", "1001")

		host, err := os.ReadFile(bootID)
		if err != nil {
			t.Fatal(err)
		}
		boot := n.exec(a, "cat", bootID)
		if boot == strings.TrimSpace(string(host)) || boot != n.exec(b, "cat", bootID) {
			n.Errorf("kernels: host %s, one container %s, the other %s", host, boot, n.exec(b, "cat", bootID))
		}
		for _, tt := range []struct{ script, want string }{
			{"hostname; cat /etc/hostname", "pod\npod"},
			{"cat /etc/resolv.conf", "search pods.test\nnameserver 10.11.12.13"},
			{"cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "77"},
			{"ps -o comm,args | grep -c '[s]leep 100'", "2"}, // the pod's pid namespace is CRI's default
			{"cat /proc/1/comm", "pause"},
			{"echo there >/dev/shm/file", ""},
		} {
			if got := n.exec(a, "sh", "-c", tt.script); got != tt.want {
				n.Errorf("%s: %q, want %q", tt.script, got, tt.want)
			}
		}
		if got := n.exec(b, "cat", "/dev/shm/file"); got != "there" {
			n.Errorf("/dev/shm of the other container has %q", got)
		}
		if got := n.crictl("logs", a); !strings.Contains(got, "hello") {
			n.Errorf("log %q", got)
		}
		n.wantStats(b)
		n.wantPodStats(p.id)
		if got := n.exec(a, "cat", "/config/key"); got != "one" {
			n.Errorf("the volume has %q", got)
		}
		n.exec(a, "sh", "-c", "/bin/watchdir /config </dev/null >/tmp/events 2>&1 & until grep -q watching /tmp/events; do sleep 0.1; done")
		change()
		n.exec(a, "sh", "-c", "until [ $(cat /config/key) = two ] && grep -qx 'moved ..data' /tmp/events; do sleep 0.1; done")
		v.check(a, b)

		before := n.memory(a)
		n.crictl("update", "--memory", strconv.Itoa(256<<20), b)
		if got := n.exec(b, "cat", "/sys/fs/cgroup/memory.max"); got != strconv.Itoa(256<<20) {
			n.Errorf("limit after the update %s", got)
		}
		if after := n.memory(a); after < before+128 {
			n.Errorf("the guest has %d MiB after the update, before %d", after, before)
		}

		p.resize(512 << 20)
		if after, want := n.memory(a), before+384; n.handler == daemon.HandlerSandbox && after < want {
			n.Errorf("the guest has %d MiB after the pod's update, want %d", after, want)
		}

		n.crictl("stop", "--timeout", "1", a)
		n.crictl("rm", a)
		if err := n.Restart(t.Context()); err != nil {
			n.Fatal(err)
		}
		again := p.start("again", nil, "sleep", "1002")
		if got := n.exec(again, "cat", bootID); got != boot {
			n.Errorf("another machine after the restart: %s, want %s", got, boot)
		}
		if got := n.exec(b, "cat", "/dev/shm/file"); got != "there" {
			n.Errorf("/dev/shm has %q after the restart", got)
		}
		n.crictl("stopp", p.id)
		n.crictl("rmp", p.id)
	})
}

// brokenNetwork has a pod's network fail after it made an interface.
func (n *node) brokenNetwork() {
	n.Helper()
	leases, list := filepath.Join(n.local.Dir, "leases"), filepath.Join(n.local.Dir, "cni/00-broken.conflist")
	text := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "broken", "plugins": [
		{"type": "bridge", "bridge": "br-broken", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.97.0.0/24"}]], "dataDir": %q}},
		{"type": "tuning", "sysctl": {"net.core.vmshim": "1"}}]}`, leases)
	if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
		n.Fatal(err)
	}
	n.awaitNetwork("broken")
	n.refused("broken", nil, "net/core/vmshim")
	if _, err := os.Stat(filepath.Join(leases, "broken")); err != nil {
		n.Errorf("the first plugin did nothing: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(leases, "broken/10.*")); err != nil || len(left) > 0 {
		n.Errorf("addresses left: %q, %v", left, err)
	}
	if err := os.Remove(list); err != nil {
		n.Fatal(err)
	}
	n.awaitNetwork("vmshim")
}

// userNamespace asks for one, which containerd 1.6 does not know of.
func (n *node) userNamespace() {
	n.Helper()
	if generation == "debian" {
		return
	}
	ids := []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}}
	n.refused("userns", func(c *runtimeapi.PodSandboxConfig) {
		c.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{
			UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids},
		}}
	}, "user namespace")
}

// refused runs a pod that has to fail with the words, and to leave nothing.
func (n *node) refused(name string, change func(*runtimeapi.PodSandboxConfig), words string) {
	n.Helper()
	before := n.links()
	if _, err := n.try("runp", "--runtime", n.handler, n.podFile(name, change)); err == nil || !strings.Contains(err.Error(), words) {
		n.Errorf("pod %s: %v, want %q", name, err, words)
	}
	left, err := n.Leftovers(n.local.StateDir())
	if err != nil {
		n.Fatal(err)
	}
	left = slices.Concat(left, n.removeCgroups(), strings.Fields(n.crictl("pods", "--quiet")))
	for _, link := range n.links() {
		if !strings.HasPrefix(link, "br-") && link != "cni0" && !slices.Contains(before, link) { // bridges stay
			left = append(left, link)
		}
	}
	if len(left) > 0 {
		n.Errorf("left of pod %s: %q", name, left)
	}
}

// awaitNetwork waits until containerd has noticed which network pods get.
func (n *node) awaitNetwork(name string) {
	n.Helper()
	var out struct {
		CNIConfig struct {
			Networks []struct{ Config struct{ Name string } }
		}
	}
	var names []string
	for deadline := time.Now().Add(30 * time.Second); !slices.Contains(names, name); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.Fatalf("networks %q, want %q", names, name)
		}
		if err := json.Unmarshal([]byte(n.crictl("info")), &out); err != nil {
			n.Fatal(err)
		}
		names = nil
		for _, network := range out.CNIConfig.Networks {
			names = append(names, network.Config.Name)
		}
	}
}

// links are the names of the host's interfaces.
func (n *node) links() (names []string) {
	n.Helper()
	all, err := net.Interfaces()
	if err != nil {
		n.Fatal(err)
	}
	for _, link := range all {
		names = append(names, link.Name)
	}
	return names
}

// configMap makes a volume as the kubelet does, and changes it so.
func (n *node) configMap() (dir string, change func()) {
	n.Helper()
	dir = filepath.Join(n.local.Dir, "volumes/kubernetes.io~configmap/map")
	write := func(generation, value string) {
		n.Helper()
		err := os.MkdirAll(filepath.Join(dir, generation), 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, generation, "key"), []byte(value), 0o644)
		}
		if err == nil {
			err = os.Symlink(generation, filepath.Join(dir, "..next"))
		}
		if err == nil {
			err = os.Rename(filepath.Join(dir, "..next"), filepath.Join(dir, "..data"))
		}
		if err != nil {
			n.Fatal(err)
		}
	}
	write("..1", "one")
	if err := os.Symlink("..data/key", filepath.Join(dir, "key")); err != nil {
		n.Fatal(err)
	}
	return dir, func() { write("..2", "two") }
}

// volumes are what the kubelet mounts for containers, beside config maps.
type volumes struct {
	*node
	dir string
}

func (n *node) volumes() *volumes {
	n.Helper()
	v := &volumes{n, filepath.Join(n.local.Dir, "pods/uid")}
	for _, dir := range []string{"volumes/disk/sub/dir", "volume-subpaths/disk/a/0", "volumes/kubernetes.io~empty-dir/memory"} {
		if err := os.MkdirAll(v.path(dir), 0o755); err != nil {
			n.Fatal(err)
		}
	}
	for _, file := range []string{"volumes/disk/sub/file", "volume-subpaths/disk/a/1", "termination.a", "termination.b"} {
		if err := os.WriteFile(v.path(file), nil, 0o666); err != nil {
			n.Fatal(err)
		}
	}
	for _, m := range []struct {
		source, target, kind, data string
		flags                      uintptr
	}{
		{v.path("volumes/disk/sub/dir"), "volume-subpaths/disk/a/0", "", "", unix.MS_BIND},
		{v.path("volumes/disk/sub/file"), "volume-subpaths/disk/a/1", "", "", unix.MS_BIND},
		{"tmpfs", "volumes/kubernetes.io~empty-dir/memory", "tmpfs", "size=1m", 0},
	} {
		if err := unix.Mount(m.source, v.path(m.target), m.kind, m.flags, m.data); err != nil {
			n.Fatal(err)
		}
		n.Cleanup(func() {
			if err := unix.Unmount(v.path(m.target), 0); err != nil {
				n.Error(err)
			}
		})
	}
	// A program that watches a directory.
	build := exec.CommandContext(n.Context(), "go", "build", "-o", v.path("watchdir"), "github.com/vmshim/vmshim/test/vm/watchdir")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		n.Fatalf("%v: %s", err, out)
	}
	return v
}

func (v *volumes) path(name string) string { return filepath.Join(v.dir, name) }

func (v *volumes) mounts(container string) []*runtimeapi.Mount {
	return []*runtimeapi.Mount{
		{HostPath: v.path("volume-subpaths/disk/a/0"), ContainerPath: "/sub/dir"},
		{HostPath: v.path("volume-subpaths/disk/a/1"), ContainerPath: "/sub/file"},
		{HostPath: v.path("volumes/kubernetes.io~empty-dir/memory"), ContainerPath: "/memory"},
		{HostPath: v.path("termination." + container), ContainerPath: "/dev/termination-log"},
		{HostPath: v.path("watchdir"), ContainerPath: "/bin/watchdir", Readonly: true},
	}
}

// check has containers write to the volumes, and looks for that on the host.
func (v *volumes) check(a, b string) {
	v.Helper()
	v.exec(a, "sh", "-c", "echo dir >/sub/dir/new; echo file >/sub/file; echo why >/dev/termination-log; echo shared >/memory/file")
	for name, want := range map[string]string{
		"volumes/disk/sub/dir/new": "dir\n", "volumes/disk/sub/file": "file\n", "termination.a": "why\n", "termination.b": "",
		"volumes/kubernetes.io~empty-dir/memory/file": "shared\n",
	} {
		if got, err := os.ReadFile(v.path(name)); err != nil || string(got) != want {
			v.Errorf("%s on the host has %q, %v; want %q", name, got, err, want)
		}
	}
	if got := v.exec(b, "cat", "/sub/dir/new", "/sub/file", "/memory/file"); got != "dir\nfile\nshared" {
		v.Errorf("the other container reads %q", got)
	}
	full := "dd if=/dev/zero of=/memory/big bs=64k count=32 2>&1; [ $(wc -c </memory/big) -lt 1048576 ] && rm /memory/big && echo less"
	if got := v.exec(b, "sh", "-c", full); !strings.Contains(got, "No space left") || !strings.HasSuffix(got, "less") {
		v.Errorf("2 MiB into a volume of 1 MiB: %q", got)
	}
}

// wantStats asks for the numbers of a container.
func (n *node) wantStats(id string) {
	n.Helper()
	var out struct {
		Stats []struct {
			CPU    struct{ UsageCoreNanoSeconds struct{ Value string } }
			Memory struct{ WorkingSetBytes struct{ Value string } }
		}
	}
	text := n.crictl("stats", "--output", "json", "--id", id)
	if err := json.Unmarshal([]byte(text), &out); err != nil || len(out.Stats) != 1 {
		n.Fatalf("statistics %s: %v", text, err)
	}
	for what, value := range map[string]string{
		"cpu": out.Stats[0].CPU.UsageCoreNanoSeconds.Value, "memory": out.Stats[0].Memory.WorkingSetBytes.Value,
	} {
		if v, err := strconv.ParseUint(value, 10, 64); err != nil || v == 0 || what == "memory" && v > 32<<20 {
			n.Errorf("%s is %q", what, value)
		}
	}
}

// wantPodStats asks for the numbers of a pod, which are those of its machine.
func (n *node) wantPodStats(id string) {
	n.Helper()
	type number struct{ Value string }
	var out struct {
		Stats []struct {
			Linux struct {
				CPU     struct{ UsageCoreNanoSeconds number }
				Memory  struct{ WorkingSetBytes number }
				Network struct {
					DefaultInterface struct {
						Name             string
						RxBytes, TxBytes number
					}
				}
			}
		}
	}
	text := n.crictl("statsp", "--output", "json", "--id", id)
	if err := json.Unmarshal([]byte(text), &out); err != nil || len(out.Stats) != 1 {
		n.Fatalf("statistics of the pod %s: %v", text, err)
	}
	l := out.Stats[0].Linux
	for what, number := range map[string]number{
		"cpu": l.CPU.UsageCoreNanoSeconds, "memory": l.Memory.WorkingSetBytes, "received": l.Network.DefaultInterface.RxBytes,
	} {
		if v, err := strconv.ParseUint(number.Value, 10, 64); err != nil || v == 0 || what == "memory" && v < 32<<20 {
			n.Errorf("%s of the pod is %q in %s", what, number.Value, text)
		}
	}
}

// memory is the guest's, in MiB.
func (n *node) memory(id string) (mib int) {
	n.Helper()
	kib := 0
	if _, err := fmt.Sscanf(n.exec(id, "grep", "MemTotal", "/proc/meminfo"), "MemTotal: %d kB", &kib); err != nil {
		n.Fatal(err)
	}
	return kib >> 10
}

// machineMiB is how large the machine of a pod without limits is.
func (n *node) machineMiB() int {
	if n.handler == daemon.HandlerSandbox {
		return handlerMiB
	}
	return defaultMiB
}

// resize says as the kubelet does, for which crictl has no command, that a pod's
// containers may use so much memory together.
func (p *pod) resize(bytes int64) {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), time.Minute)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+p.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		p.Fatal(err)
	}
	defer conn.Close()
	if _, err := runtimeapi.NewRuntimeServiceClient(conn).UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
		PodSandboxId: p.id, Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: bytes},
	}); err != nil {
		p.Fatal(err)
	}
}

// What is lost with the machine is told, and removed.
func TestE2EPodMachineKilled(t *testing.T) {
	eachHandler(t, func(n *node) {
		p := n.run("lost", nil)
		var ids []string
		for i := range 5 {
			ids = append(ids, p.start(fmt.Sprintf("c%d", i), nil, "sleep", "1000"))
		}
		n.kill("qemu-system")
		for _, id := range ids {
			if st := n.awaitExit(id); st.ExitCode != 137 {
				n.Errorf("container ended as %+v", st)
			}
		}
		n.awaitNotReady(p.id)
		n.crictl("rmp", "--force", p.id)
	})
}

func TestE2EPodShimKilled(t *testing.T) {
	eachHandler(t, func(n *node) {
		p := n.run("lost", nil)
		id := p.start("c", nil, "sleep", "1000")
		n.kill("containerd-shim-vm-v2")
		if st := n.awaitExit(id); st.ExitCode == 0 {
			n.Errorf("container ended as %+v", st)
		}
		n.awaitNotReady(p.id)
		n.crictl("rmp", "--force", p.id)
	})
}

// kill kills the process whose program's name has the text in it.
func (n *node) kill(program string) {
	n.Helper()
	processes, err := n.Processes()
	if err != nil {
		n.Fatal(err)
	}
	for _, p := range processes {
		if strings.Contains(p.Args[0], program) {
			if err := unix.Kill(p.PID, unix.SIGKILL); err != nil {
				n.Fatal(err)
			}
			return
		}
	}
	n.Fatalf("no process %q among %v", program, processes)
}

func (n *node) awaitNotReady(pod string) {
	n.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		if strings.Contains(n.crictl("inspectp", pod), "SANDBOX_NOTREADY") {
			return
		}
		if time.Now().After(deadline) {
			n.Fatalf("pod %s is still ready", pod)
		}
	}
}
