package shim

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestConfigured(t *testing.T) {
	dir := t.TempDir()
	write := func(name, stateDir string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("state_dir = '"+stateDir+"'\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Setenv("VMSHIM_CONFIG", write("env", "/run/env"))
	named := write("named", "/run/named")
	// As typeurl makes it of a message: the bare name.
	pack := func(url string, m proto.Message) *anypb.Any {
		value, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return &anypb.Any{TypeUrl: url, Value: value}
	}
	body := []byte("state_dir = '/run/body'\n")
	for _, c := range []struct {
		name    string
		options *anypb.Any
		want    string
	}{
		{"none", nil, "/run/env"},
		{"empty", &anypb.Any{}, "/run/env"},
		{"runc's", pack("containerd.runc.v1.Options", &options.Options{BinaryName: "runc"}), "/run/env"},
		{"without anything", pack("runtimeoptions.v1.Options", &runtimeoptions.Options{TypeUrl: "x"}), "/run/env"},
		{"path", pack("runtimeoptions.v1.Options", &runtimeoptions.Options{ConfigPath: named}), "/run/named"},
		{"body", pack("runtimeoptions.v1.Options", &runtimeoptions.Options{ConfigBody: body}), "/run/body"},
		{"both", pack("runtimeoptions.v1.Options", &runtimeoptions.Options{ConfigPath: named, ConfigBody: body}), "/run/named"},
		{"with a host", pack("type.googleapis.com/runtimeoptions.v1.Options", &runtimeoptions.Options{ConfigPath: named}), "/run/named"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, err := configured(c.options)
			if err != nil || cfg.StateDir != c.want {
				t.Errorf("state directory %q, %v; want %q", cfg.StateDir, err, c.want)
			}
		})
	}
}
