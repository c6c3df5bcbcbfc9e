package main

import (
	"fmt"
	"time"
)

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

// clockParams make an emulated machine tell the time by the TSC, which QEMU takes
// from this processor: all other clocks cost an exit into QEMU, and hosts of
// machines ask often. The frequency is given, because a guest that calibrates on
// a busy host errs; within a hundredth of what it is told the kernel corrects
// (tsc_refine_calibration_work).
func clockParams() []string {
	const span = 50 * time.Millisecond
	from, began := reading()
	<-time.After(span)
	to, ended := reading()
	khz := float64(to-from) / ended.Sub(began).Seconds() / 1000
	return []string{"clocksource=tsc", "tsc=reliable", fmt.Sprintf("tsc_early_khz=%.0f", khz)}
}

// reading is a moment in both clocks, read without an interruption between.
func reading() (uint64, time.Time) {
	for {
		before := time.Now()
		ticks := rdtsc()
		if time.Since(before) < 5*time.Microsecond {
			return ticks, before
		}
	}
}
