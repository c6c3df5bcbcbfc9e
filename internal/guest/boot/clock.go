package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/vmshim/vmshim/internal/guest/module"
)

const (
	clockDevice   = "/dev/ptp0"
	clockInterval = 5 * time.Second
	clockStep     = 100 * time.Millisecond // beyond it the clock is set at once
	clockSlack    = 200 * time.Microsecond // within it the clock is left alone
)

// keepClock follows the host's clock as long as KVM shows it to the guest. A
// guest without ptp_kvm gets its time from the host (SetGuestDateTime).
func keepClock(ctx context.Context, modules *module.Loader) {
	sources, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/available_clocksource")
	if err != nil || !strings.Contains(string(sources), "kvm-clock") {
		return // not KVM
	}
	err = modules.Load("ptp_kvm", "")
	if errors.Is(err, unix.EOPNOTSUPP) { // the host's own time is not the TSC's, as in a virtual machine
		log.G(ctx).Debug("the clock is for the host to set")
		return
	}
	if err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).Warn("clock is not kept")
		return
	}
	ptp, err := os.Open(clockDevice)
	if err != nil {
		log.G(ctx).WithError(err).Warn("clock is not kept")
		return
	}
	defer ptp.Close()
	for again := time.Tick(clockInterval); ; <-again {
		if err := follow(ctx, ptp); err != nil {
			log.G(ctx).WithError(err).Warn("clock is no longer kept")
			return
		}
	}
}

func follow(ctx context.Context, ptp *os.File) error {
	ahead, err := offset(ptp)
	switch {
	case err != nil:
		return err
	case ahead.Abs() < clockSlack:
		return nil
	case ahead.Abs() < clockStep:
		return slew(ahead)
	default:
		log.G(ctx).WithField("by", ahead.String()).Info("clock set")
		return step(ahead)
	}
}

// offset says how much the host's clock is ahead of the guest's.
func offset(ptp *os.File) (time.Duration, error) {
	if s, err := unix.IoctlPtpSysOffsetPrecise(int(ptp.Fd())); err == nil {
		return ptpTime(s.Device).Sub(ptpTime(s.Realtime)), nil
	}
	var before, host, after unix.Timespec
	clock := unix.FdToClockID(int(ptp.Fd()))
	for _, read := range []struct {
		clock int32
		to    *unix.Timespec
	}{{unix.CLOCK_REALTIME, &before}, {clock, &host}, {unix.CLOCK_REALTIME, &after}} {
		if err := unix.ClockGettime(read.clock, read.to); err != nil {
			return 0, fmt.Errorf("read clock: %w", err)
		}
	}
	middle := time.Unix(before.Unix()).Add(time.Unix(after.Unix()).Sub(time.Unix(before.Unix())) / 2)
	return time.Unix(host.Unix()).Sub(middle), nil
}

func ptpTime(t unix.PtpClockTime) time.Time { return time.Unix(t.Sec, int64(t.Nsec)) }

// slew moves the clock slowly, so that no process sees it jump.
func slew(ahead time.Duration) error {
	t := unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: ahead.Microseconds()}
	_, err := unix.Adjtimex(&t)
	return err
}

// step moves the clock at once.
func step(ahead time.Duration) error {
	t := setOffset(ahead)
	_, err := unix.Adjtimex(&t)
	return err
}

func setOffset(ahead time.Duration) unix.Timex {
	sec, nsec := ahead/time.Second, ahead%time.Second
	if nsec < 0 { // the kernel wants the fraction positive
		sec, nsec = sec-1, nsec+time.Second
	}
	return unix.Timex{
		Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO,
		Time:  unix.Timeval{Sec: int64(sec), Usec: int64(nsec)},
	}
}
