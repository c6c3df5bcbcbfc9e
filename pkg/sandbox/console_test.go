package sandbox

import (
	"errors"
	"net"
	"path/filepath"
	"syscall"
	"testing"
)

func TestRootConsole(t *testing.T) {
	e := newEnv(t)
	s := e.running()
	idle, err := net.Dial("unix", filepath.Join(e.opts.Dir, consoleName)) // reads nothing
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	for range 2 {
		if got, err := ReadConsole(t.Context(), e.opts.Dir); got != "last words" || err != nil {
			t.Errorf("console %q, %v", got, err)
		}
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadConsole(t.Context(), e.opts.Dir); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("after stop: %v", err)
	}
}
