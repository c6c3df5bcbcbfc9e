package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
	"github.com/vmshim/vmshim/pkg/agent/protocol/types"
	"github.com/vmshim/vmshim/pkg/hypervisor"
)

var lifecycleRows = []row{
	{1, "Init", "–", "what the guest had yet to write to a disk at stop is there, because the host was told to wait", proveInit, with[noInit]},
	{2, "Capabilities", "GetGuestDetails", "streams and share are there in the guest; a plain peer has fewer", proveCapabilities, with[noCapabilities]},
	{3, "Check", "Health.Check", "fails within its bound while QEMU is stopped, serves before and after", proveCheck, with[noCheck]},
	{4, "LongLiveConn", "–", "connections that the guest's agent has open between calls", proveLongLiveConn, with[noLongLiveConn]},
	{5, "Disconnect", "–", "a blocked call returns; the guest's agent has lost the connection", proveDisconnect, with[noDisconnect]},
	{6, "AgentURL", "–", "a second client dials it: one connection more in the guest", proveAgentURL, with[noAgentURL]},
	{7, "SetAgentURL", "–", "a client without an address dials it: one connection more in the guest", proveSetAgentURL, with[noSetAgentURL]},
	{8, "ReuseAgent", "–", "calls go on over the connection that the guest knows; an exit status stays known", proveReuseAgent, with[noReuseAgent]},
	{9, "CreateSandbox", "–", "a machine that can't be reached is refused; otherwise the guest sees a file of the share", proveCreateSandbox, with[noCreateSandbox]},
	{11, "StartSandbox", "CreateSandbox and the network's", "hostname, resolv.conf, module, mounts, address, route, neighbour in the guest", proveStartSandbox, with[noStartSandbox]},
	{12, "StopSandbox", "DestroySandbox", "the guest powers off by itself", proveStopSandbox, with[noStopSandbox]},
	{29, "Configure", "–", "a client without settings reaches the machine: a connection in the guest", proveConfigure, with[noConfigure]},
	{30, "ConfigureFromRPC", "–", "a machine that runs already works: its connection stays, the new settings hold", proveConfigureFromRPC, with[noConfigureFromRPC]},
	{40, "MarkDead", "–", "no call blocks although QEMU is stopped; the guest's agent has lost the connection", proveMarkDead, with[noMarkDead]},
	{41, "Cleanup", "–", "the connection is gone in the guest", proveCleanup, with[noCleanup]},
	{42, "Save", "–", "a client made from the saved bytes reaches the guest: one connection more", proveSave, with[noSave]},
	{43, "Load", "–", "a second client goes on with a container of the first", proveLoad, with[noLoad]},
}

func proveInit(e *env) {
	disk := filepath.Join(e.t.TempDir(), "disk.img")
	e.ok(os.WriteFile(disk, nil, 0o600))
	e.ok(os.Truncate(disk, 16*mib))
	e.boot(startGuest, func(s *hypervisor.Spec) { s.Disks = []hypervisor.Disk{{ID: "traces", Path: disk}} })
	keep, err := e.Init(e.ctx, e.settings())
	e.ok(err)
	e.equal("host waits without tracing", keep, false)
	tracing := e.settings()
	tracing.Tracing = true
	keep, err = e.Init(e.ctx, tracing)
	e.ok(err)
	e.sees("mke2fs /dev/vda >/dev/null 2>&1 && echo made", "made") // its node comes before its driver
	e.look(`mkdir /run/traces && mount -t ext4 /dev/vda /run/traces && sync && echo the last trace > /run/traces/f`)
	e.ok(e.StopSandbox(e.ctx))
	if keep {
		e.powersOff()
	} else {
		e.ok(e.guest.Kill())
	}
	b, err := os.ReadFile(disk)
	e.ok(err)
	if !bytes.Contains(b, []byte("the last trace\n")) {
		e.fail("the last trace was not written")
	}
}

// powersOff waits until the guest did so, and nobody else.
func (e *env) powersOff() {
	soon(e, "the guest powers off", e.guest.Done())
	if err := e.guest.Err(); err == nil || !strings.Contains(err.Error(), "guest powered off") {
		e.fail("the machine is gone for another reason: %w", err)
	}
}

func proveCapabilities(e *env) {
	ours, err := e.Capabilities(e.ctx)
	e.ok(err)
	e.equal("streams of our agent", ours.ByteStreams, listens(e, e.guest.Dial, extension.StreamPort))
	e.equal("share of our agent", ours.SharedFS, e.look(`grep -c 'kataShared virtiofs\|virtiofs kataShared\|^kataShared .* virtiofs' /proc/mounts`) == "1")

	peer := agenttest.Start(e.t, agenttest.Options{Plain: true})
	plainAgent, _ := e.client(agent.Settings{Dial: peer.Dial})
	plain, err := plainAgent.Capabilities(e.ctx)
	e.ok(err)
	e.equal("streams of a plain peer", plain.ByteStreams, listens(e, peer.Dial, extension.StreamPort))
	if reflect.DeepEqual(ours, plain) {
		e.fail("a plain peer has the same: %+v", plain)
	}
	if !ours.Extension || plain.Extension {
		e.fail("extension: our agent %v, a plain peer %v", ours.Extension, plain.Extension)
	}
}

func listens(e *env, dial func(context.Context, uint32) (net.Conn, error), port uint32) bool {
	conn, err := dial(e.ctx, port)
	if err == nil {
		_ = conn.Close()
	}
	return err == nil
}

func proveCheck(e *env) {
	c, _ := e.client(e.settings())
	e.ok(c.Check(e.ctx))
	resume := e.stop()
	ctx, cancel := context.WithTimeout(e.ctx, 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	err := c.Check(ctx)
	took := time.Since(began)
	resume()
	e.is("check of a guest that stands still", err, context.DeadlineExceeded)
	if took > time.Second {
		e.fail("check took %v, its bound was 300 ms", took)
	}
	e.ok(c.Check(e.ctx))
}

func proveLongLiveConn(e *env) {
	for _, perCall := range []bool{false, true} {
		s := e.settings()
		s.DialPerCall = perCall
		c, _ := e.client(s)
		before := e.sockets()
		e.ok(c.Check(e.ctx))
		if c.LongLiveConn() {
			first := without(e.sockets(), before)
			e.equal("connections after a call", len(first), 1)
			e.ok(c.Check(e.ctx))
			e.equal("connections after another", without(e.sockets(), before), first)
		} else {
			e.until("the guest has no connection between calls", func() bool { return len(without(e.sockets(), before)) == 0 })
		}
	}
}

// block makes a call that waits for a process, and returns when the guest has
// its connection.
func block(e *env, c agent.Agent) <-chan error {
	id := e.run("/bin/sleep", "1000")
	before := e.sockets()
	blocked := make(chan error, 1)
	ctx := context.WithoutCancel(e.ctx)
	go func() { // ends with the client, at the latest
		_, err := c.WaitProcess(ctx, id, "")
		blocked <- err
	}()
	e.until("the guest has a connection more", func() bool { return len(without(e.sockets(), before)) == 1 })
	return blocked
}

// disconnected waits until the guest's agent has no more connections than before.
func disconnected(e *env, before []string) {
	e.until("the guest has lost the connection", func() bool { return len(without(e.sockets(), before)) == 0 })
}

func proveDisconnect(e *env) {
	c, _ := e.client(e.settings())
	before := e.sockets()
	blocked := block(e, c)
	e.ok(c.Disconnect())
	e.is("the blocked call", soon(e, "the blocked call returns", blocked), errdefs.ErrUnavailable)
	e.ok(c.Disconnect())
	disconnected(e, before)
}

// dials proves that a client's next call makes a connection that the guest sees.
func dials(e *env, c agent.Agent) {
	before := e.sockets()
	e.ok(c.Check(e.ctx))
	e.equal("new connections in the guest", len(without(e.sockets(), before)), 1)
}

func proveAgentURL(e *env) {
	url, err := e.AgentURL()
	e.ok(err)
	_, second := e.client(agent.Settings{URL: url})
	dials(e, second)
}

func proveSetAgentURL(e *env) {
	c, _ := e.client(agent.Settings{})
	e.is("call without an address", c.Check(e.ctx), errdefs.ErrFailedPrecondition)
	e.ok(c.SetAgentURL(e.settings().URL))
	dials(e, c)
}

func proveReuseAgent(e *env) {
	dialed := 0
	s := e.settings()
	s.Dial = func(ctx context.Context, port uint32) (net.Conn, error) {
		dialed++
		return e.guest.Dial(ctx, port)
	}
	_, first := e.client(s)
	second, _ := e.client(agent.Settings{})
	id := e.run("/bin/sh", "-c", "exit 5")
	_, err := first.WaitProcess(e.ctx, id, "") // by which the guest forgets it
	e.ok(err)
	sockets := e.sockets()
	e.ok(second.ReuseAgent(first))
	e.ok(second.Check(e.ctx))
	exit, err := second.WaitProcess(e.ctx, id, "")
	e.ok(err)
	e.equal("exit status", exit.Code, int32(5))
	e.equal("connections in the guest", e.sockets(), sockets)
	e.equal("times dialed", dialed, 1)
}

func proveCreateSandbox(e *env) {
	c, _ := e.client(agent.Settings{})
	e.is("machine without an address", c.CreateSandbox(e.ctx), errdefs.ErrFailedPrecondition)
	c, _ = e.client(e.settings())
	e.ok(c.CreateSandbox(e.ctx))
	file := filepath.Join(e.guest.Share, "hello")
	e.ok(os.WriteFile(file, []byte("from the host"), 0o644))
	defer os.Remove(file)
	e.equal("file in the guest", e.look("cat "+shareDir+"/hello"), "from the host")
}

func proveStartSandbox(e *env) {
	e.boot(bootGuest)
	n := e.plugNIC()
	request := plainSandbox()
	request.Hostname, request.Dns = "pod", []string{"nameserver 192.0.2.53", "search example.test"}
	request.KernelModules = []*protocol.KernelModule{{Name: "dummy", Parameters: []string{"numdummies=0"}}}
	request.Storages = append(request.Storages, &protocol.Storage{
		Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: sandboxDir + "/shm",
		Options: []string{"noexec", "nosuid", "nodev", "mode=1777", "size=1048576"},
	})
	e.ok(e.StartSandbox(e.ctx, agent.Sandbox{
		Request:    request,
		Interfaces: []*types.Interface{n.wanted("eth0", "192.0.2.5", "24")},
		Routes:     []*types.Route{{Dest: "198.51.100.0/24", Gateway: "192.0.2.1", Device: "eth0"}},
		Neighbors:  []*types.ARPNeighbor{neighbor("192.0.2.1", "eth0", "02:00:00:00:00:99")},
	}))
	// Whatever became of it, there has to be one for the observer.
	if err := e.guest.client.StartSandbox(e.ctx, agent.Sandbox{Request: plainSandbox()}); !errdefs.IsAlreadyExists(err) {
		e.ok(err)
	}
	e.guest.observe(e.t)
	e.equal("resolv.conf", e.look("cat /etc/resolv.conf"), "nameserver 192.0.2.53\nsearch example.test")
	e.equal("hostname", e.look("hostname"), "pod")
	e.look("test -d /sys/module/dummy || ! test -e /proc/modules") // the tuned kernel has it built in
	e.equal("shm", e.look("grep ' "+sandboxDir+"/shm ' /proc/mounts | sed s/,inode64//"), "shm "+sandboxDir+"/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=1024k 0 0")
	e.equal("share", e.look("grep -c '^kataShared "+shareDir+" virtiofs ' /proc/mounts"), "1")
	e.equal("address", e.look("ip -o -4 addr show dev eth0 | awk '{print $4}'"), "192.0.2.5/24")
	e.equal("route", e.look("ip route show to 198.51.100.0/24"), "198.51.100.0/24 via 192.0.2.1 dev eth0")
	e.equal("neighbour", e.look("ip neigh show to 192.0.2.1 | awk '{print $1, $3, $5, $NF}'"), "192.0.2.1 eth0 02:00:00:00:00:99 PERMANENT")
}

func proveStopSandbox(e *env) {
	e.boot(bootGuest)
	e.ok(e.guest.client.StartSandbox(e.ctx, agent.Sandbox{Request: plainSandbox()}))
	e.run("/bin/sleep", "1000")
	e.ok(e.StopSandbox(e.ctx))
	e.powersOff()
}

func proveConfigure(e *env) {
	c, _ := e.client(agent.Settings{})
	e.ok(c.Configure(e.ctx, e.settings()))
	dials(e, c)
}

func proveConfigureFromRPC(e *env) {
	// As a pool hands it over: a client that knows where the machine is, and a
	// connection to it.
	c, _ := e.client(e.settings())
	dials(e, c)
	sockets := e.sockets()
	e.ok(c.ConfigureFromRPC(e.ctx, agent.Settings{RequestTimeout: 200 * time.Millisecond}))
	e.ok(c.Check(e.ctx))
	e.equal("connections in the guest", e.sockets(), sockets)
	resume := e.stop()
	ended := make(chan error, 1)
	ctx := context.WithoutCancel(e.ctx) // without a deadline it gets the settings'
	go func() { ended <- c.Check(ctx) }()
	select {
	case err := <-ended:
		e.is("call beyond the new bound", err, context.DeadlineExceeded)
	case <-time.After(2 * time.Second):
		e.fail("a call goes on, the new bound is 200 ms")
	}
	resume()
	// And one that knows nothing yet.
	c, _ = e.client(agent.Settings{})
	e.ok(c.ConfigureFromRPC(e.ctx, e.settings()))
	dials(e, c)
}

func proveMarkDead(e *env) {
	c, _ := e.client(e.settings())
	before := e.sockets()
	blocked := block(e, c)
	resume := e.stop()
	began := time.Now()
	c.MarkDead(errors.New("qemu was killed"))
	calls := everyCall(e, c)
	took := time.Since(began)
	resume()
	for name, err := range calls {
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "qemu was killed") {
			e.fail("%s: got error %v", name, err)
		}
	}
	if took > 2*time.Second {
		e.fail("%d calls took %v", len(calls), took)
	}
	e.is("the blocked call", soon(e, "the blocked call returns", blocked), errdefs.ErrUnavailable)
	disconnected(e, before)
}

// everyCall makes every call that needs the guest, and gives their errors.
func everyCall(e *env, c agent.Agent) map[string]error {
	ctx, cancel := context.WithTimeout(e.ctx, 2*time.Second)
	defer cancel()
	errs := map[string]error{}
	v := reflect.ValueOf(c)
	for m := range reflect.TypeFor[agent.Agent]().Methods() {
		switch m.Name {
		case "Init", "Configure", "ConfigureFromRPC", "CreateSandbox", "Cleanup", "CopyFile": // need no guest, or a file
			continue
		}
		if m.Type.NumIn() == 0 || m.Type.In(0) != reflect.TypeFor[context.Context]() {
			continue
		}
		args := []reflect.Value{reflect.ValueOf(ctx)}
		for i := 1; i < m.Type.NumIn(); i++ {
			arg := reflect.New(m.Type.In(i)).Elem()
			switch arg.Kind() {
			case reflect.Pointer:
				arg.Set(reflect.New(arg.Type().Elem()))
			case reflect.Slice: // of no bytes there is nothing to read or write
				arg.Set(reflect.MakeSlice(arg.Type(), 1, 1))
			}
			args = append(args, arg)
		}
		results := v.MethodByName(m.Name).Call(args)
		err, _ := reflect.TypeAssert[error](results[len(results)-1])
		errs[m.Name] = err
	}
	return errs
}

func proveCleanup(e *env) {
	c, _ := e.client(e.settings())
	before := e.sockets()
	dials(e, c)
	e.ok(c.Cleanup(e.ctx))
	disconnected(e, before)
}

func proveSave(e *env) {
	c, _ := e.client(e.settings())
	state, err := c.Save()
	e.ok(err)
	b, err := json.Marshal(state)
	e.ok(err)
	var again agent.SavedState
	e.ok(json.Unmarshal(b, &again))
	_, second := e.client(agent.Settings{})
	e.ok(second.Load(again))
	dials(e, second)
}

func proveLoad(e *env) {
	state, err := e.guest.client.Save()
	e.ok(err)
	id := e.run("/bin/sleep", "1000")
	second, _ := e.client(agent.Settings{})
	e.ok(second.Load(state))
	e.ok(second.Exec(e.ctx, &protocol.ExecProcessRequest{ContainerId: id, ExecId: "e", Process: process("/bin/sleep", "77")}))
	e.sees(hasCommand(id, "/bin/sleep 77"), "1")
}
