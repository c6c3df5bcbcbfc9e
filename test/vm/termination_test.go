package vm

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

func terminationLog(t *testing.T, m *machine) {
	get := func(id string) (string, error) {
		resp, err := m.agent.GetDiagnosticData(m.ctx(), &protocol.GetDiagnosticDataRequest{LogType: "termination_log", ContainerId: id})
		return string(resp.GetData()), err
	}
	m.create("term", nil, "/bin/sh", "-c", "echo live > /dev/termination-log; sleep 1000")
	m.startContainer("term")
	m.eventually("the log of a running container", func() bool { got, err := get("term"); return err == nil && got == "live\n" })
	m.remove("term")
	_, err := get("term")
	wantClass(t, "a container that is gone", err, errdefs.ErrNotFound)

	m.create("term", func(r *protocol.CreateContainerRequest) {
		r.OCI.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/var/why"}
	}, "/bin/sh", "-c", "busybox mkdir /var; echo because > /var/why; exit 3")
	m.startContainer("term")
	m.wait("term", "term")
	if got, err := get("term"); got != "because\n" || err != nil {
		t.Errorf("of an ended one: %q, %v", got, err)
	}
	m.remove("term")
}
