package qmp

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// Version is QEMU's version.
type Version struct{ Major, Minor, Micro int }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// An Event is what QEMU tells without being asked.
type Event struct {
	Name string
	Data json.RawMessage // nil when there is none
	Time time.Time       // by the host's clock; zero when QEMU could not tell
}

// An Error is QEMU's refusal of a command.
type Error struct {
	Class string // "GenericError", "CommandNotFound", "DeviceNotFound", …
	Desc  string // for people
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %.512q", e.Class, e.Desc) }

// Unwrap gives the class that callers can act on.
func (e *Error) Unwrap() error {
	switch e.Class {
	case "CommandNotFound":
		return errdefs.ErrNotImplemented
	case "DeviceNotFound":
		return errdefs.ErrNotFound
	}
	return nil
}

// A message is any line that QEMU sends (docs/interop/qmp-spec): the greeting,
// an event, or a reply, which returns or fails.
type message struct {
	Greeting *struct {
		Version struct {
			QEMU Version `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`

	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`

	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

var errNoMessage = errors.New("not a greeting, an event or a reply")

// parse reads one line. What it returns does not share memory with the line.
func parse(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("line %.64q: %w", line, err)
	}
	kinds := 0
	for _, is := range []bool{m.Greeting != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return message{}, fmt.Errorf("line %.64q: %w", line, errNoMessage)
	}
	return m, nil
}

// id is zero for a reply to nothing, such as an error that QEMU found before
// it found the id.
func (m message) id() uint64 {
	if m.ID == nil {
		return 0
	}
	return *m.ID
}

func (m message) event() Event {
	e := Event{Name: m.Event, Data: m.Data}
	if m.Timestamp.Seconds > 0 { // -1: unknown
		e.Time = time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)
	}
	return e
}

// decode gives what a reply returns.
func (m message) decode(reply any) error {
	if m.Error != nil {
		return &Error{Class: m.Error.Class, Desc: m.Error.Desc}
	}
	if reply == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, reply); err != nil {
		return fmt.Errorf("decode reply: %w", err)
	}
	return nil
}
