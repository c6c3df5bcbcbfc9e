package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestIsFresh(t *testing.T) {
	out := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(out, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string, want bool) {
		t.Helper()
		if got := isFresh(out, []byte("agent 1\n")); got != want {
			t.Errorf("%s: isFresh = %v, want %v", when, got, want)
		}
	}
	check("nothing made", false)
	for _, name := range images {
		write(name, "x")
	}
	check("made by somebody else", false)
	write(inputsName, "agent 0\n")
	check("of another agent", false)
	write(inputsName, "agent 1\n")
	check("of the same", true)
	if err := os.Remove(filepath.Join(out, images[1])); err != nil {
		t.Fatal(err)
	}
	check("one file gone", false)
}
