package guest

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// maxSeed bounds what the host can mix into the random numbers at once.
const maxSeed = 4 << 10

// SetGuestDateTime implements the protocol.
func (s *service) SetGuestDateTime(_ context.Context, req *protocol.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	if req.GetSec() < 0 || req.GetUsec() < 0 || req.GetUsec() >= 1e6 {
		return nil, invalid("time %d s %d µs", req.GetSec(), req.GetUsec())
	}
	now := unix.Timespec{Sec: req.GetSec(), Nsec: req.GetUsec() * 1000}
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
		return nil, fmt.Errorf("set clock: %w", err)
	}
	return &emptypb.Empty{}, nil
}

// ReseedRandomDev implements the protocol: the bytes are mixed in, they count as
// random, and the generator starts anew from them.
func (s *service) ReseedRandomDev(_ context.Context, req *protocol.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	data := req.GetData()
	if len(data) == 0 || len(data) > maxSeed {
		return nil, invalid("seed of %d bytes", len(data))
	}
	f, err := os.OpenFile("/dev/random", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.RNDADDTOENTCNT, 8*len(data)); err != nil {
		return nil, fmt.Errorf("count entropy: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.RNDRESEEDCRNG, 0); err != nil {
		return nil, fmt.Errorf("reseed: %w", err)
	}
	return &emptypb.Empty{}, nil
}
