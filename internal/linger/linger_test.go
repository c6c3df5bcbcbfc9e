package linger

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// It waits as often as it may, and no longer than for what has come.
func TestDo(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := w.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	empty, silent, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer empty.Close()
	defer silent.Close()
	for name, c := range map[string]struct {
		file  *os.File
		times int
		err   error // of every call
		calls int   // after which it is done; 0: never
		want  int   // calls
		done  bool
	}{
		"done at once":           {r, 3, nil, 1, 1, true},
		"interrupted":            {r, 0, unix.EINTR, 4, 4, true},
		"not yet, and ready":     {r, 3, unix.EAGAIN, 3, 3, true},
		"ready, and never done":  {r, 3, unix.EAGAIN, 0, 4, false},
		"may not wait":           {r, 0, unix.EAGAIN, 0, 1, false},
		"not ready":              {empty, 3, unix.EAGAIN, 0, 1, false},
		"goes on without a wait": {r, 0, nil, 5, 5, true},
		"fails":                  {r, 3, broken, 0, 1, false},
	} {
		calls := 0
		done, err := Do(int(c.file.Fd()), unix.POLLIN, c.times, func(int) (bool, error) {
			if calls++; calls == c.calls {
				return true, nil
			}
			return false, c.err
		})
		if calls != c.want || done != c.done || (err != nil) != errors.Is(c.err, broken) {
			t.Errorf("%s: %d calls, done %v, %v", name, calls, done, err)
		}
	}
}
