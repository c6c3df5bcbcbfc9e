package boot

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSetOffset(t *testing.T) {
	for _, tt := range []struct {
		ahead     time.Duration
		sec, nsec int64
	}{
		{90 * time.Second, 90, 0},
		{1500 * time.Millisecond, 1, 5e8},
		{-1, -1, 999_999_999},
		{-time.Second, -1, 0},
		{-1500 * time.Millisecond, -2, 5e8},
	} {
		got := setOffset(tt.ahead)
		if got.Time.Sec != tt.sec || got.Time.Usec != tt.nsec || got.Modes&unix.ADJ_NANO == 0 {
			t.Errorf("setOffset(%v) = %d s + %d ns, want %d + %d", tt.ahead, got.Time.Sec, got.Time.Usec, tt.sec, tt.nsec)
		}
	}
}
