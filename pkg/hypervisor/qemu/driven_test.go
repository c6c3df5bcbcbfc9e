package qemu

import (
	"context"
	"errors"
	"testing"
	"time"
)

// Nobody reaches a guest that has said nothing before it has driven its vsock for
// a moment: the fake QEMU insists on being asked three times, and no fourth time
// before it is told to end.
func TestDialWhenDriven(t *testing.T) {
	vm := startFake(t, behaviour{qemu: "driven"})
	vm.settle = time.Hour
	brief, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := vm.Dial(brief, 1024); !errors.Is(err, errNotDriven) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial: %v", err)
	}
	vm.settle = time.Millisecond
	for range 2 {
		conn, err := vm.Dial(within(t), 1024)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	if err := vm.qmp.Execute(within(t), "system_powerdown", nil, nil); err != nil {
		t.Error(err)
	}
}

// QEMU before 7.2 can't tell: whoever dials gets through.
func TestDialOldQEMU(t *testing.T) {
	vm := startFake(t, behaviour{qemu: "old"})
	for range 2 {
		conn, err := vm.Dial(within(t), 1024)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
}
