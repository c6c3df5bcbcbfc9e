package kvm

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
	"github.com/vmshim/vmshim/pkg/sandbox"
	"github.com/vmshim/vmshim/test/ociimage"
)

// TestKVMSandboxesAtOnce starts sandboxes at the same moment. All of them run
// together, each at an address of its own; afterwards the addresses are free.
func TestKVMSandboxesAtOnce(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("VMSHIM_SANDBOXES"))
	if err != nil {
		n = 3
	}
	limit := time.Hour // the host may be emulated
	// What is not about many at once is done for a few at a time: containerd and its
	// client give each other seconds.
	const few = 4
	needMemory(t, n*240)
	h := start(t, "memory_mib = 160")
	ctx := within(t, limit)
	// Context ids are what this is about, not boots.
	if err := h.local.MakeTemplates(ctx); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprintf("kvm-crowd-%d", i))
	}
	each := func(what string, atOnce int, do func(id string) (string, error)) {
		t.Helper()
		var jobs errgroup.Group
		jobs.SetLimit(atOnce)
		began := time.Now()
		for _, id := range ids {
			jobs.Go(func() error {
				if out, err := do(id); err != nil {
					t.Errorf("%s %s: %v: %s", what, id, err, out)
				}
				return nil
			})
		}
		_ = jobs.Wait() // they speak for themselves
		t.Logf("%s %d sandboxes: %.0f s", what, n, time.Since(began).Seconds())
	}
	ctr := func(ctx context.Context, args ...string) (string, error) {
		out, err := h.Ctr(ctx, args...).CombinedOutput()
		return string(out), err
	}

	var once sync.Once
	remove := func() {
		ctx := within(t, limit)
		each("remove", few, func(id string) (string, error) {
			_, _ = ctr(ctx, "task", "delete", "--force", id) // there is none if it did not start
			return ctr(ctx, "container", "delete", id)
		})
		h.eventually("nothing is left", func() string {
			left, err := h.Leftovers(h.local.StateDir(), ids...)
			if err != nil {
				return err.Error()
			}
			return strings.Join(left, "\n")
		})
	}
	t.Cleanup(func() { once.Do(remove) })

	each("start", n, func(id string) (string, error) {
		return ctr(ctx, "run", "--detach", "--runtime", runtime, ociimage.Name, id, "sleep", "100000")
	})
	if t.Failed() {
		t.FailNow()
	}
	each("exec in", few, func(id string) (string, error) {
		out, err := ctr(ctx, "task", "exec", "--exec-id", "e", id, "echo", id)
		if err == nil && strings.TrimSpace(out) != id {
			err = fmt.Errorf("not what was asked for")
		}
		return out, err
	})
	cids := contextIDs(t, h.local.StateDir())
	if len(cids) != n {
		t.Errorf("%d sandboxes have %d context ids", n, len(cids))
	}
	once.Do(remove)
	for cid := range cids {
		if err := claim(cid); err != nil {
			t.Errorf("context id %d is not free: %v", cid, err)
		}
	}
}

// needMemory is for tests that many machines make expensive.
func needMemory(t *testing.T, mib int) {
	t.Helper()
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int
		if _, err := fmt.Sscanf(line, "MemAvailable: %d", &kib); err == nil && kib/1024 < mib {
			need.Missing(t, "needs %d MiB of memory, and there are %d (kvmhost -memory)", mib, kib/1024)
		}
	}
}

// contextIDs are those at which the agents of all sandboxes listen.
func contextIDs(t *testing.T, stateDir string) map[uint64]bool {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(stateDir, strings.Repeat("?", 16)))
	if err != nil {
		t.Fatal(err)
	}
	cids := map[uint64]bool{}
	for _, dir := range dirs {
		st, err := sandbox.ReadState(dir)
		if err != nil {
			t.Fatal(err)
		}
		agent, err := url.Parse(st.Agent)
		if err != nil {
			t.Fatal(err)
		}
		cid, err := strconv.ParseUint(agent.Hostname(), 10, 32)
		if err != nil {
			t.Fatalf("agent at %s: %v", st.Agent, err)
		}
		cids[cid] = true
	}
	return cids
}

// claim gives a context id to a device of its own, and lets go of it.
func claim(cid uint64) error {
	device, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	const setGuestCID = 0x4008af60 // VHOST_VSOCK_SET_GUEST_CID
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), setGuestCID, uintptr(unsafe.Pointer(&cid))); errno != 0 {
		return errno
	}
	return nil
}
