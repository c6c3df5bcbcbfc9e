package qmp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"testing"
)

func TestErrorIsBounded(t *testing.T) {
	err := &Error{Class: "GenericError", Desc: string(bytes.Repeat([]byte("\n"), 4096))}
	if n := len(err.Error()); n > 1100 {
		t.Errorf("%d bytes", n)
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`,
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": false, "reason": "host-qmp-quit"}}`,
		`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}`,
		`{"return": {}, "id": 1}`,
		`{"return": null, "id": 1}`,
		`{"error": {"class": "GenericError", "desc": "x"}, "id": 18446744073709551615}`,
		`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`,
		`{"id": "text", "return": []}`,
		`[]`, `{}`, ``, `{"QMP":`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := parse(line)
		if err != nil {
			return
		}
		_ = m.event()
		_ = m.id()
		var v any
		if err := m.decode(&v); err == nil && !json.Valid(m.Return) {
			t.Errorf("%q returned %q", line, m.Return)
		}
	})
}

// FuzzLines feeds a whole connection's bytes to the reader.
func FuzzLines(f *testing.F) {
	f.Add([]byte("{\"return\": {}, \"id\": 1}\r\n{\"event\": \"STOP\"}\n"))
	f.Add([]byte("\n\n"))
	f.Add([]byte("{\"return\": {}"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		answer := make(chan message, 1)
		c := &Client{onEvent: func(e Event) {
			if e.Name == "" {
				t.Error("event without a name")
			}
		}, pending: map[uint64]chan message{1: answer}}
		if err := c.dispatch(bufio.NewScanner(bytes.NewReader(stream))); err == nil {
			t.Error("the end of a connection is no error")
		}
	})
}
