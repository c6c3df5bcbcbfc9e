package agent

import (
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

var empty = &emptypb.Empty{}

// methods lists the RPCs of a .proto file.
func methods(tb testing.TB, file string) (names []string) {
	tb.Helper()
	services := map[string]protoreflect.FileDescriptor{
		"agent":     protocol.File_pkg_agent_protocol_agent_proto,
		"health":    protocol.File_pkg_agent_protocol_health_proto,
		"extension": extension.File_pkg_agent_protocol_extension_extension_proto,
	}[file].Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			names = append(names, string(services.Get(i).Methods().Get(j).Name()))
		}
	}
	return names
}
