// Package cleanup undoes a series of steps in reverse order.
package cleanup

import (
	"errors"
	"slices"
)

// A Stack holds what undoes the steps taken so far. The zero value is empty.
// It is for one goroutine:
//
//	var undo cleanup.Stack
//	defer func() { err = errors.Join(err, undo.Run()) }()
//	… undo.Add(f) …
//	undo.Release()
type Stack struct{ fs []func() error }

// Add pushes a function that undoes the step just taken.
func (s *Stack) Add(f func() error) { s.fs = append(s.fs, f) }

// Release forgets all functions: the steps are to stay.
func (s *Stack) Release() { s.fs = nil }

// Take moves the functions to a new stack, for an owner that undoes them later.
func (s *Stack) Take() *Stack {
	t := &Stack{fs: s.fs}
	s.fs = nil
	return t
}

// Run calls the functions, last one first, each of them whatever the others
// return, and forgets them. It returns all errors, joined.
func (s *Stack) Run() error {
	var errs []error
	for _, f := range slices.Backward(s.fs) {
		if err := f(); err != nil {
			errs = append(errs, err)
		}
	}
	s.fs = nil
	return errors.Join(errs...)
}
