package qemu

import (
	"errors"
	"testing"
	"time"
)

// Nobody dials a guest that has said nothing before it has driven its vsock for
// a moment.
func TestDialWhenDriven(t *testing.T) {
	vm := startFake(t, behaviour{qemu: "driven"})
	const dials = 8 // three of them ask QEMU
	vm.settle = time.Hour
	for i := range dials {
		if i == 3 {
			vm.settle = 0
		}
		conn, err := vm.Dial(within(t), 1024)
		if err == nil {
			conn.Close()
		}
		if early := i < 3; errors.Is(err, errNotDriven) != early || !early && err != nil {
			t.Errorf("dial %d: %v", i+1, err)
		}
	}
}

// QEMU before 7.2 can't tell: whoever dials gets through.
func TestDialOldQEMU(t *testing.T) {
	vm := startFake(t, behaviour{qemu: "old"})
	conn, err := vm.Dial(within(t), 1024)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
