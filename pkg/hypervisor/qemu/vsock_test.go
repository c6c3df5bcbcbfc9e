package qemu

import (
	"errors"
	"os"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/need"
)

// TestKVMContextIDs has many machines ask for a context id at once, with few to
// choose from, so that they clash; all are free afterwards.
func TestKVMContextIDs(t *testing.T) {
	if _, err := os.Stat("/dev/vhost-vsock"); err != nil {
		need.Missing(t, "needs /dev/vhost-vsock (module vhost_vsock)")
	}
	const machines = 50
	first := randomCID()
	var mu sync.Mutex
	var next uint32
	pick := func() uint32 { // each id is proposed to three of them
		mu.Lock()
		defer mu.Unlock()
		next++
		return first + next/3
	}
	devices := map[uint32]*os.File{}
	var jobs sync.WaitGroup
	for range machines {
		jobs.Go(func() {
			device, cid, err := openVhostVsock(pick)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if devices[cid] != nil {
				t.Errorf("context id %d was given twice", cid)
			}
			devices[cid] = device
		})
	}
	jobs.Wait()
	if len(devices) != machines || int(next) <= machines {
		t.Errorf("%d devices after %d proposals", len(devices), next)
	}
	for taken := range devices {
		if _, _, err := openVhostVsock(func() uint32 { return taken }); !errors.Is(err, errdefs.ErrResourceExhausted) {
			t.Errorf("%d could be had again: %v", taken, err)
		}
		break
	}
	for _, device := range devices {
		device.Close()
	}
	for cid := range devices {
		device, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := setGuestCID(device, cid); err != nil {
			t.Errorf("context id %d is not free: %v", cid, err)
		}
		if err := setGuestCID(device, 2); !errors.Is(err, unix.EINVAL) { // the host's own
			t.Errorf("context id 2: %v", err)
		}
		device.Close()
	}
}
