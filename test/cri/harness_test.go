// Package cri runs pods in machines through containerd's CRI plugin and crictl,
// with a pause container and with the sandbox API.
package cri

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmshim/vmshim/test/daemon"
	"github.com/vmshim/vmshim/test/ociimage"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		os.Exit(m.Run()) // nothing that needs namespaces
	}
	code, done, err := daemon.Isolate(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if !done {
		code = m.Run()
	}
	os.Exit(code)
}

// generation is which containerd; see daemon.Generations. The sandbox API came
// with 2.
var generation = cmp.Or(os.Getenv("VMSHIM_TEST_CONTAINERD"), "2")

// handlerMiB is the memory of machines by the configuration that the sandbox API's
// handler names; others have the default.
const handlerMiB, defaultMiB = 352, 256

// A node is a containerd with CRI.
type node struct {
	*testing.T
	*daemon.Daemon
	local   *daemon.Local
	handler string
	logs    string
}

// newNode starts one, whose pods have the handler. Nothing may be left of them.
func newNode(t *testing.T, handler string) *node {
	t.Helper()
	if testing.Short() {
		t.Skip("starts machines; not in short mode")
	}
	// Sockets lie in it, so its name is short.
	dir, err := os.MkdirTemp("", "vmcri") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	local, err := daemon.NewLocal(t.Context(), dir, "debug = true")
	if err == nil {
		err = local.Built()
	}
	if err != nil {
		t.Fatal(err)
	}
	handlers := filepath.Join(dir, "handler.toml")
	text := local.Config("debug = true") + fmt.Sprintf("memory_mib = %d\n", handlerMiB)
	if err := os.WriteFile(handlers, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := local.StartCRI(t.Context(), generation, daemon.CRI{
		PauseImage: ociimage.Name, Network: fmt.Sprintf(daemon.Network, filepath.Join(dir, "addresses")), HandlerConfig: handlers,
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{T: t, Daemon: d, local: local, handler: handler, logs: filepath.Join(dir, "logs")}
	t.Cleanup(n.clean)
	if out, err := d.Ctr(t.Context(), "--namespace", "k8s.io", "images", "import", filepath.Join(dir, "busybox.tar")).CombinedOutput(); err != nil {
		t.Fatalf("import image: %v: %s", err, out)
	}
	return n
}

func (n *node) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if n.Failed() {
		n.Logf("log of containerd:\n%s", n.Tail(80))
	}
	_ = n.Crictl(ctx, "rmp", "--all", "--force").Run()
	var left []string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var err error
		if left, err = n.Leftovers(n.local.StateDir()); err != nil {
			n.Fatal(err)
		}
		if len(left) == 0 {
			break
		}
	}
	left = append(left, n.removeCgroups()...)
	if len(left) > 0 {
		n.Errorf("left on the host:\n%s", strings.Join(left, "\n"))
	}
	if err := n.Stop(); err != nil {
		n.Error(err)
	}
	if n.Failed() {
		n.Logf("left for inspection: %s", n.local.Dir)
		return
	}
	_ = os.RemoveAll(n.local.Dir)
}

// cgroupParent is where the pods' groups are. The kubelet makes those of pods and
// removes them; here nobody else does.
func cgroupParent() string { return fmt.Sprintf("/vmshim-test-%d", os.Getpid()) }

// removeCgroups removes the groups of pods, and returns those that were not empty.
func (n *node) removeCgroups() (left []string) {
	for _, pattern := range []string{"*" + cgroupParent() + "/*", "*" + cgroupParent(), cgroupParent()[1:] + "/*", cgroupParent()[1:]} {
		dirs, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", pattern))
		if err != nil {
			n.Error(err)
		}
		for _, dir := range dirs {
			if info, err := os.Stat(dir); err != nil || !info.IsDir() {
				continue
			}
			if err := os.Remove(dir); err != nil {
				left = append(left, "cgroup "+err.Error())
			}
		}
	}
	return left
}

// try runs crictl with a time limit.
func (n *node) try(args ...string) (stdout string, err error) {
	n.Helper()
	ctx, cancel := context.WithTimeout(n.Context(), 3*time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := n.Crictl(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("crictl %q: %w\n%s%s", args, err, out.String(), errs.String())
	}
	return out.String(), nil
}

// crictl runs it, and it has to succeed.
func (n *node) crictl(args ...string) string {
	n.Helper()
	out, err := n.try(args...)
	if err != nil {
		n.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// file writes a request for crictl.
func (n *node) file(name string, message any) string {
	n.Helper()
	text, err := json.Marshal(message)
	if err != nil {
		n.Fatal(err)
	}
	path := filepath.Join(n.local.Dir, name+".json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		n.Fatal(err)
	}
	return path
}

// A pod is one that runs.
type pod struct {
	*node
	id, file string
}

func (n *node) run(name string, change func(*runtimeapi.PodSandboxConfig)) *pod {
	n.Helper()
	path := n.podFile(name, change)
	return &pod{node: n, file: path, id: n.crictl("runp", "--runtime", n.handler, path)}
}

// podFile writes the configuration of a pod.
func (n *node) podFile(name string, change func(*runtimeapi.PodSandboxConfig)) (path string) {
	n.Helper()
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		Hostname:     name,
		LogDirectory: filepath.Join(n.logs, name),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: filepath.Join(cgroupParent(), name)},
	}
	if change != nil {
		change(config)
	}
	return n.file(name, config)
}

// start runs a container in the pod.
func (p *pod) start(name string, change func(*runtimeapi.ContainerConfig), command ...string) (id string) {
	p.Helper()
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: ociimage.Name},
		Command:  command,
		LogPath:  name + ".log",
		Linux:    &runtimeapi.LinuxContainerConfig{},
	}
	if change != nil {
		change(config)
	}
	id = p.crictl("create", "--no-pull", p.id, p.node.file(name, config), p.file)
	p.crictl("start", id)
	return id
}

// exec runs a command in a container.
func (n *node) exec(id string, command ...string) string {
	n.Helper()
	return n.crictl(slices.Concat([]string{"exec", "--sync", id}, command)...)
}

// inspect is the status of a container.
func (n *node) inspect(id string) *runtimeapi.ContainerStatus {
	n.Helper()
	var out struct {
		Status struct {
			State    string `json:"state"`
			ExitCode int32  `json:"exitCode"`
			Reason   string `json:"reason"`
		} `json:"status"`
	}
	if err := json.Unmarshal([]byte(n.crictl("inspect", id)), &out); err != nil {
		n.Fatal(err)
	}
	return &runtimeapi.ContainerStatus{
		State:    runtimeapi.ContainerState(runtimeapi.ContainerState_value[out.Status.State]),
		ExitCode: out.Status.ExitCode, Reason: out.Status.Reason,
	}
}

// awaitExit waits until a container has ended.
func (n *node) awaitExit(id string) *runtimeapi.ContainerStatus {
	n.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		if st := n.inspect(id); st.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return st
		}
		if time.Now().After(deadline) {
			n.Fatalf("container %s runs on", id)
		}
	}
}
