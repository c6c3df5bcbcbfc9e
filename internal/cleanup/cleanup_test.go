package cleanup

import (
	"errors"
	"slices"
	"testing"
)

func TestStack(t *testing.T) {
	var s Stack
	var order []int
	first, second := errors.New("first"), errors.New("second")
	s.Add(func() error { order = append(order, 1); return first })
	s.Add(func() error { order = append(order, 2); return nil })
	s.Add(func() error { order = append(order, 3); return second })
	moved := s.Take()
	if err := s.Run(); err != nil || len(order) > 0 {
		t.Fatalf("what was taken ran: %v, %v", order, err)
	}
	err := moved.Run()
	if want := []int{3, 2, 1}; !slices.Equal(order, want) {
		t.Errorf("order %v, want %v", order, want)
	}
	if !errors.Is(err, first) || !errors.Is(err, second) {
		t.Errorf("error %v lacks one of two", err)
	}
	if err := moved.Run(); err != nil || len(order) != 3 {
		t.Errorf("ran twice: %v, %v", order, err)
	}
	moved.Add(func() error { order = append(order, 4); return nil })
	moved.Release()
	if err := moved.Run(); err != nil || len(order) != 3 {
		t.Errorf("ran after Release: %v, %v", order, err)
	}
}
