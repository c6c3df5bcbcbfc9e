package shim

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmshim/vmshim/pkg/config"
)

// Settings by which containerd's clients may say more than the file does. The
// names of types have come with several prefixes over the years.
const (
	runtimeOptions = "runtimeoptions.v1.Options" // CRI and ctr --runtime-config-path
	runcOptions    = "runc.v1.Options"           // what clients send that know runc only
)

// settings is the configuration for a container: the file, what containerd
// sends, the annotations that may change something.
func settings(options *anypb.Any, annotations map[string]string) (config.Config, error) {
	cfg, err := configured(options)
	if err != nil {
		return cfg, err
	}
	return cfg.Annotate(annotations)
}

// configured is the configuration that the options name or contain. Those of
// runc (its binary, its root, console sockets) mean nothing here.
func configured(options *anypb.Any) (config.Config, error) {
	switch url := options.GetTypeUrl(); {
	case url == "", strings.HasSuffix(url, runcOptions):
		return config.Load("")
	case strings.HasSuffix(url, runtimeOptions):
		var o runtimeoptions.Options
		if err := proto.Unmarshal(options.GetValue(), &o); err != nil {
			return config.Config{}, fmt.Errorf("decode runtime options: %w: %w", errdefs.ErrInvalidArgument, err)
		}
		if o.GetConfigPath() == "" && len(o.GetConfigBody()) > 0 {
			return config.Parse("runtime options", o.GetConfigBody())
		}
		return config.Load(o.GetConfigPath())
	default:
		return config.Config{}, fmt.Errorf("runtime options of type %q: %w", url, errdefs.ErrInvalidArgument)
	}
}

// isOptions says that a message is one of those that configured takes.
func isOptions(a *anypb.Any) bool {
	return strings.HasSuffix(a.GetTypeUrl(), runtimeOptions) || strings.HasSuffix(a.GetTypeUrl(), runcOptions)
}

// decodeAny decodes a specification that containerd sends as JSON.
func decodeAny[T any](a *anypb.Any) (*T, error) {
	v := new(T)
	if err := json.Unmarshal(a.GetValue(), v); err != nil {
		return nil, fmt.Errorf("decode %s: %w: %w", a.GetTypeUrl(), errdefs.ErrInvalidArgument, err)
	}
	return v, nil
}
