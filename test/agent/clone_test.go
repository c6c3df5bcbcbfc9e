package agent_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmshim/vmshim/internal/cleanup"
	"github.com/vmshim/vmshim/internal/vmtest"
	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// A clone is a machine that goes on from a snapshot, or the one that it is of:
// QEMU by hand, because what pkg/hypervisor/qemu starts has devices that can't
// be in a snapshot (those of vhost-user). Of such this one has only the vsock,
// which comes and goes.
type clone struct {
	guest
	dir   string
	qmp   *qmp.Client
	vsock map[string]any // what device_add is told
	undo  cleanup.Stack
}

// startClone starts QEMU, whose guest stands still. An empty snapshot boots.
func (e *env) startClone(snapshot string) *clone {
	opts, spec, like := vmtest.Options(e.t), vmtest.Spec(e.t), e.guest.Cmdline()
	c := &clone{dir: opts.Dir}
	e.undo.Add(func() error { return c.undo.Run() })
	args := []string{
		"-S", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", option(like, "-machine"), "-accel", option(like, "-accel"), "-cpu", option(like, "-cpu"),
		"-m", "size=256M", "-object", "memory-backend-memfd,id=mem,size=256M,share=on",
		"-qmp", "unix:" + c.path("qmp") + ",server=on,wait=off",
		"-device", "pcie-pci-bridge,id=hotplug,bus=pcie.0,addr=2",
		"-kernel", spec.Kernel, "-initrd", spec.Initrd, "-append", withoutReady(option(like, "-append")),
	}
	dial := c.makeVsock(e, opts.Host, &args)
	if snapshot != "" {
		args = append(args, "-incoming", "exec:cat "+snapshot)
	}
	running := c.run(e, opts.Host.QEMU, args...)
	e.until("qemu listens", func() bool {
		running()
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: c.path("qmp"), Net: "unix"})
		if err != nil {
			return false
		}
		c.qmp, err = qmp.Connect(e.ctx, conn, nil)
		e.ok(err)
		return true
	})
	c.undo.Add(c.qmp.Close)
	c.guest = guest{Machine: &vmtest.Machine{Dial: dial, Share: e.t.TempDir()}, client: agent.New(agent.Settings{Dial: dial})}
	c.undo.Add(c.client.Disconnect)
	return c
}

// makeVsock prepares the device that is to come, and says how to dial it.
func (c *clone) makeVsock(e *env, host *qemu.Host, args *[]string) vsock.Dialer {
	c.vsock = map[string]any{"id": "vsock", "bus": "hotplug", "addr": "1"}
	if host.Vsock == qemu.VsockKernel {
		cid := 1<<20 + rand.Uint32N(1<<30)
		c.vsock["driver"], c.vsock["guest-cid"] = "vhost-vsock-pci", cid
		return vsock.Kernel(cid)
	}
	running := c.run(e, host.VhostDeviceVsock, "--guest-cid=3", "--socket="+c.path("control"), "--uds-path="+c.path("streams"))
	e.until("vhost-device-vsock listens", func() bool {
		running()
		_, err := os.Stat(c.path("control"))
		return err == nil
	})
	*args = append(*args, "-chardev", "socket,id=vsock,path="+c.path("control"))
	c.vsock["driver"], c.vsock["chardev"] = "vhost-user-vsock-pci", "vsock"
	return vsock.Hybrid(c.path("streams"))
}

func (c *clone) path(name string) string { return filepath.Join(c.dir, name) }

// run runs a program until the clone ends. What it returns fails when it has
// ended before.
func (c *clone) run(e *env, program string, args ...string) (running func()) {
	var said strings.Builder
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	e.ok(cmd.Start())
	ended := make(chan struct{})
	go func() { // joined by undo
		_ = cmd.Wait()
		close(ended)
	}()
	c.undo.Add(func() error {
		_ = cmd.Process.Kill()
		<-ended
		for _, socket := range []string{"qmp", "control", "streams"} {
			_ = os.Remove(c.path(socket))
		}
		return nil
	})
	return func() {
		select {
		case <-ended:
			e.fail("%s: %v: %s", program, cmd.ProcessState, said.String())
		default:
		}
	}
}

// option is the value of one of QEMU's.
func option(cmdline []string, name string) string {
	return cmdline[slices.Index(cmdline, name)+1]
}

// withoutReady is a kernel's command line that has the guest call nobody.
func withoutReady(params string) string {
	return strings.Join(slices.DeleteFunc(strings.Fields(params), func(p string) bool {
		return strings.HasPrefix(p, "vmshim.ready=")
	}), " ")
}

// goOn lets the guest run, with a vsock, until it answers. Rarely one never does:
// vhost-device-vsock was seen to lose the thread that serves a guest (.ci/run).
func (c *clone) goOn(e *env, ask func(context.Context) error) bool {
	e.until("the snapshot is read", func() bool {
		var state struct{ Status string }
		e.ok(c.qmp.Execute(e.ctx, "query-status", nil, &state))
		return state.Status != "inmigrate"
	})
	e.ok(c.qmp.Execute(e.ctx, "device_add", c.vsock, nil))
	e.ok(c.qmp.Execute(e.ctx, "cont", nil, nil))
	// vhost-device-vsock does not survive a connection for a guest that has no driver yet.
	e.until("the guest has its vsock", func() bool {
		var device struct {
			Status struct{ Statuses []string }
		}
		e.ok(c.qmp.Execute(e.ctx, "x-query-virtio-status", map[string]any{"path": "/machine/peripheral/vsock/virtio-backend"}, &device))
		return slices.ContainsFunc(device.Status.Statuses, func(s string) bool { return strings.Contains(s, "DRIVER_OK") })
	})
	late := time.After(vmtest.Within(25 * time.Second))
	for {
		ctx, cancel := context.WithTimeout(e.ctx, 3*time.Second)
		err := ask(ctx)
		cancel()
		if err == nil {
			return true
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-late:
			e.t.Logf("a clone does not answer: %v", err)
			e.ok(c.undo.Run())
			return false
		case <-e.ctx.Done():
			e.fail("a clone does not answer: %w", err)
		}
	}
}

// freeze takes the vsock away and writes the machine to a file.
func (c *clone) freeze(e *env, file string) {
	e.until("the guest lets its vsock go", func() bool {
		return errdefs.IsNotFound(c.qmp.Execute(e.ctx, "device_del", map[string]any{"id": "vsock"}, nil))
	})
	e.ok(c.qmp.Execute(e.ctx, "stop", nil, nil))
	e.ok(c.qmp.Execute(e.ctx, "migrate", map[string]any{"uri": "exec:cat > " + file}, nil))
	e.until("the snapshot is written", func() bool {
		var m struct {
			Status string
			Error  string `json:"error-desc"`
		}
		e.ok(c.qmp.Execute(e.ctx, "query-migrate", nil, &m))
		if m.Status == "failed" {
			e.fail("write snapshot: %s", m.Error)
		}
		return m.Status == "completed"
	})
}

func (c *clone) script(e *env, script string) string {
	out, err := c.look(e.ctx, script)
	e.ok(err)
	return out
}

// A kernel seeds its generator by itself when half of its uptime has passed since
// the last time (crng_reseed_interval in drivers/char/random.c). A snapshot is
// made soon after that: seconds later than this many of uptime clones are through.
const settled = 8

// snapshot is the file of a guest that has an observer and says when its
// generator is seeded; empty: there is none this time.
func (e *env) snapshot() string {
	c := e.startClone("")
	if !c.goOn(e, c.client.Check) {
		return ""
	}
	e.ok(c.client.StartSandbox(e.ctx, agent.Sandbox{Request: &protocol.CreateSandboxRequest{Hostname: "clone", SandboxId: "clone"}}))
	c.observe(e.t)
	c.script(e, watchReseeds)
	e.until("the generator is seeded", func() bool {
		at, _ := strconv.Atoi(c.script(e, `sed -n 's/.* \([0-9]*\)\.[0-9]*: reseeded:.*/\1/p' `+tracing+`/trace | tail -n 1`))
		return at >= settled*vmtest.Patience()
	})
	c.script(e, "echo > "+tracing+"/trace")
	file := filepath.Join(e.t.TempDir(), "snapshot")
	c.freeze(e, file)
	e.ok(c.undo.Run())
	return file
}

// A draw is what a guest's generator gave: numbers as long as its key. Each has a
// key of its own, made with the one before, so that generators with the same
// key give the same ones, though others draw some, too.
type draw map[string]bool

const draws = 256

func (c *clone) draw(e *env) draw {
	d := draw{}
	for line := range strings.Lines(c.script(e, fmt.Sprintf(`dd if=/dev/urandom bs=32 count=%d 2>/dev/null | hexdump -v -e '32/1 "%%02x" "\n"'`, draws))) {
		d[strings.TrimSpace(line)] = true
	}
	if len(d) != draws {
		e.fail("%d different numbers of %d", len(d), draws)
	}
	return d
}

// common is how many numbers two have.
func (d draw) common(other draw) (n int) {
	for s := range d {
		if other[s] {
			n++
		}
	}
	return n
}

// reseedClone goes on from a snapshot and calls ReseedRNG, and gives what the
// generator gave before and after. Alone: the clone answered, and its kernel did
// not seed by itself.
func (e *env) reseedClone(snapshot string, seed []byte) (before, after draw, alone bool) {
	c := e.startClone(snapshot)
	if !c.goOn(e, func(ctx context.Context) error { _, err := c.look(ctx, "true"); return err }) {
		return nil, nil, false
	}
	before = c.draw(e)
	e.ok(e.wrap(c.client).ReseedRNG(e.ctx, seed))
	after = c.draw(e)
	alone = c.script(e, "grep 'reseeded:' "+tracing+"/trace | grep -vc ' exe-'; true") == "0" // not the agent
	e.ok(c.undo.Run())
	return before, after, alone
}

// reseedClones proves that ReseedRNG is what makes clones differ. A kernel that
// seeds by itself meanwhile proves nothing: then there is another snapshot.
func (e *env) reseedClones() {
	for range 3 {
		if e.guest.snapshot == "" {
			if e.guest.snapshot = e.snapshot(); e.guest.snapshot == "" {
				continue
			}
		}
		before, after, alone := e.reseedClone(e.guest.snapshot, []byte("of one clone"))
		other, otherAfter, otherAlone := e.reseedClone(e.guest.snapshot, []byte("of the other"))
		if !alone || !otherAlone {
			e.guest.snapshot = ""
			continue
		}
		if n := before.common(other); n < draws/2 {
			e.fail("clones have %d of %d numbers in common before the call", n, draws)
		}
		e.equal("numbers in common after the call", after.common(otherAfter), 0)
		return
	}
	e.fail("no pair of clones whose kernels answer, and seed by the call alone")
}
