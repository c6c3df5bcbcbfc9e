package daemon

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Handlers are the names of the runtimes that a daemon with CRI has.
const (
	HandlerRunc    = "runc"
	HandlerVM      = "vm"         // a pause container stands for the pod
	HandlerSandbox = "vm-sandbox" // containerd's sandbox API; from 2.0 on
)

// CRI has a daemon serve the Kubernetes container runtime interface.
type CRI struct {
	// Tools has crictl in it.
	Tools string
	// PauseImage is what pods are made of; import it, or have Mirror serve it.
	PauseImage string
	// Mirror is the URL of a registry that is asked for every image; empty: none.
	Mirror string
	// Network is the text of a CNI configuration list; its plugins are Debian's.
	Network string
	// HandlerConfig is the shim's configuration for HandlerSandbox, which names it
	// in its options; empty: the one of all.
	HandlerConfig string
}

// write makes the files that the configuration names.
func (c *CRI) write(d *Daemon) error {
	for path, text := range map[string]string{
		"cni/10.conflist":             c.Network,
		"certs.d/_default/hosts.toml": fmt.Sprintf("[host.'%s']\n  capabilities = ['pull', 'resolve']\n", c.Mirror),
	} {
		if err := os.MkdirAll(filepath.Dir(d.path(path)), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(d.path(path), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// config is the CRI plugin's part. Lowering an OOM score is more than every
// root may do, so pods go without. Network namespaces are mounted below
// the daemon's directory, for whoever looks for what is left.
func (c *CRI) config(d *Daemon) string {
	if strings.HasPrefix(d.Version, "1.") {
		return fmt.Sprintf(`[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = '%s'
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.grpc.v1.cri'.registry]
  config_path = '%s'
[plugins.'io.containerd.grpc.v1.cri'.cni]
  bin_dir = '/usr/lib/cni'
  conf_dir = '%s'
`, c.PauseImage, d.path("certs.d"), d.path("cni")) + runtimes("io.containerd.grpc.v1.cri", "", "")
	}
	return fmt.Sprintf(`[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '%s'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '%s'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/usr/lib/cni']
  conf_dir = '%s'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
`, c.PauseImage, d.path("certs.d"), d.path("cni")) +
		runtimes("io.containerd.cri.v1.runtime", HandlerSandbox, c.HandlerConfig)
}

func runtimes(plugin, sandboxAPI, config string) string {
	var text strings.Builder
	for _, name := range []string{HandlerRunc, HandlerVM, sandboxAPI} {
		if name == "" {
			continue
		}
		kind, extra := "io.containerd.vm.v2", "  privileged_without_host_devices = true\n"
		switch name {
		case HandlerRunc:
			kind, extra = "io.containerd.runc.v2", ""
		case sandboxAPI:
			extra += "  sandboxer = 'shim'\n  disable_pause_image_pull = true\n"
		}
		fmt.Fprintf(&text, "[plugins.'%s'.containerd.runtimes.%s]\n  runtime_type = '%s'\n%s", plugin, name, kind, extra)
		if name == sandboxAPI && config != "" {
			fmt.Fprintf(&text, "[plugins.'%s'.containerd.runtimes.%s.options]\n  ConfigPath = '%s'\n", plugin, name, config)
		}
	}
	return text.String()
}

// Crictl is the client of CRI, talking to this daemon.
func (d *Daemon) Crictl(ctx context.Context, args ...string) *exec.Cmd {
	endpoint := "unix://" + d.Address()
	cmd := exec.CommandContext(ctx, filepath.Join(d.cfg.CRI.Tools, "crictl"), append([]string{
		"--runtime-endpoint", endpoint, "--image-endpoint", endpoint, "--timeout", "120s",
	}, args...)...)
	cmd.Env = d.environ()
	cmd.WaitDelay = 5 * time.Second
	return cmd
}
