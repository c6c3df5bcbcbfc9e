package main

import (
	"context"
	"encoding/gob"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// port is where the machine's server listens.
const port = 1024

// The machine says every beat that it lives, and each time from the next of its
// processors: one that hangs hides behind the others. It is lost when it says
// nothing for the time that silence is, long for a machine that is emulated and
// busy.
const (
	beat    = 5 * time.Second
	silence = 3 * time.Minute
)

// An order is what the machine is to do: the only message to it.
type order struct {
	Mounts []mounted // the first one is the root
	Args   []string
	Env    []string
	Dir    string
	Files  []string // patterns of path.Match, absolute: what to send back
}

// mounted says where a share belongs.
type mounted struct{ Tag, Path string }

// A frame is one piece of what comes back. One with Done is the last.
type frame struct {
	Stream int    // 1 or 2: Data was written there
	File   string // Data belongs to this file; the first piece makes it
	Mode   fs.FileMode
	Data   []byte
	Host   string // what the machine is, once
	Alive  bool   // nothing else to say
	Lost   bool   // the machine was; to the parent only
	Done   bool
	Code   int    // exit status
	Err    string // the command could not be run, or a file not be read
}

// A sender is an encoder for several goroutines.
type sender struct {
	mu  sync.Mutex
	enc *gob.Encoder // guarded by mu
}

func newSender(w io.Writer) *sender { return &sender{enc: gob.NewEncoder(w)} }

func (s *sender) send(f frame) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.enc.Encode(f)
}

// An output sends what is written to it as the output of the command.
type output struct {
	to     *sender
	stream int
}

func (o output) Write(b []byte) (int, error) {
	if err := o.to.send(frame{Stream: o.stream, Data: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// sayAlive does so every beat, until the context ends.
func (s *sender) sayAlive(ctx context.Context, beat time.Duration) error {
	runtime.LockOSThread() // and never unlocked: the thread, bound to a processor, ends with the goroutine
	ticker := time.NewTicker(beat)
	defer ticker.Stop()
	for cpu := 0; ; cpu = (cpu + 1) % runtime.NumCPU() {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("move to processor %d: %w", cpu, err)
		}
		if err := s.send(frame{Alive: true}); err != nil {
			return err
		}
	}
}
