package guest

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxErrorText bounds what a request can make the agent repeat.
const maxErrorText = 4 << 10

// intercept is the only place where errors become status codes, and where a
// failed request is logged.
func intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	decode := func(v any) error {
		if err := unmarshal(v); err != nil {
			return fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
		}
		return nil
	}
	resp, err := method(ctx, decode)
	if err == nil {
		return resp, nil
	}
	log.G(ctx).WithError(err).WithField("method", info.FullMethod).Debug("request failed")
	return nil, toStatus(err)
}

// toStatus maps an error to what goes over the wire. What has no class is
// INTERNAL, as the protocol has it.
func toStatus(err error) error {
	code := codes.Internal
	if class := errdefs.Resolve(err); class != nil && !errors.Is(class, errdefs.ErrUnknown) {
		code = status.Code(errgrpc.ToGRPC(class))
	}
	return status.Error(code, bound(err.Error(), maxErrorText))
}

// bound cuts a text and makes it fit for a protobuf string.
func bound(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}

func notFound(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrNotFound)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

func precondition(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition)
}

// notImplemented is the answer of what this agent does not do.
func notImplemented(what string) error {
	return fmt.Errorf("%s: %w", what, errdefs.ErrNotImplemented)
}
