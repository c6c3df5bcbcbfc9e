// Package plain speaks the agent protocol without this project's help: ttrpc
// frames and messages are put together by hand from their field numbers. It
// shares no code with the two ends that it tests, so that what they misunderstand
// alike is found all the same. It knows nothing that this project added.
//
// Client is a host, Server an agent whose processes are functions.
package plain

import (
	"encoding/binary"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
)

// The services on the wire.
const (
	Agent  = "grpc.AgentService"
	Health = "grpc.Health"
)

// Codes of a status, as gRPC numbers them.
const (
	InvalidArgument    = 3
	NotFound           = 5
	AlreadyExists      = 6
	FailedPrecondition = 9
	Unimplemented      = 12
	Internal           = 13
)

// A Status is an answer that is an error.
type Status struct {
	Code uint64
	Text string
}

func (s *Status) Error() string { return fmt.Sprintf("code %d: %s", s.Code, s.Text) }

// A Msg is an encoded message. Its methods append a field.
type Msg []byte

// Str appends a string or bytes.
func (m Msg) Str(n protowire.Number, values ...string) Msg {
	for _, v := range values {
		m = protowire.AppendString(protowire.AppendTag(m, n, protowire.BytesType), v)
	}
	return m
}

// Int appends a number or a bool.
func (m Msg) Int(n protowire.Number, v uint64) Msg {
	return protowire.AppendVarint(protowire.AppendTag(m, n, protowire.VarintType), v)
}

// Sub appends messages.
func (m Msg) Sub(n protowire.Number, values ...Msg) Msg {
	for _, v := range values {
		m = protowire.AppendBytes(protowire.AppendTag(m, n, protowire.BytesType), v)
	}
	return m
}

// Fields are what a message holds, by number.
type Fields map[protowire.Number][]Value

// A Value is one field.
type Value struct {
	Int   uint64
	Bytes []byte
}

// Decode takes a message apart. Fields of fixed size are skipped: the protocol
// has none that this package reads.
func Decode(b []byte) (Fields, error) {
	f := Fields{}
	for len(b) > 0 {
		num, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		b = b[n:]
		var v Value
		switch kind {
		case protowire.VarintType:
			v.Int, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			v.Bytes, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(num, kind, b)
		}
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		b = b[n:]
		f[num] = append(f[num], v)
	}
	return f, nil
}

func (f Fields) last(n protowire.Number) (v Value) {
	if list := f[n]; len(list) > 0 {
		v = list[len(list)-1]
	}
	return v
}

// Str is a string or bytes.
func (f Fields) Str(n protowire.Number) string { return string(f.last(n).Bytes) }

// Int is a number or a bool.
func (f Fields) Int(n protowire.Number) uint64 { return f.last(n).Int }

// Strs are repeated strings.
func (f Fields) Strs(n protowire.Number) (list []string) {
	for _, v := range f[n] {
		list = append(list, string(v.Bytes))
	}
	return list
}

// Sub is a message, empty when it is missing or none.
func (f Fields) Sub(n protowire.Number) Fields {
	sub, err := Decode(f.last(n).Bytes)
	if err != nil {
		return Fields{}
	}
	return sub
}

// Subs are repeated messages.
func (f Fields) Subs(n protowire.Number) (list []Fields) {
	for _, v := range f[n] {
		if sub, err := Decode(v.Bytes); err == nil {
			list = append(list, sub)
		}
	}
	return list
}

// Types of frames.
const (
	request  = 1
	response = 2
)

// maxFrame is the limit of both ends (ttrpc's documentation).
const maxFrame = 4 << 20

// A frame is the unit of ttrpc: ten bytes of header, big endian, and a message.
type frame struct {
	stream uint32
	kind   byte
	body   []byte
}

func readFrame(r io.Reader) (f frame, err error) {
	var head [10]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return f, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > maxFrame {
		return f, fmt.Errorf("frame of %d bytes", size)
	}
	f = frame{stream: binary.BigEndian.Uint32(head[4:]), kind: head[8], body: make([]byte, size)}
	_, err = io.ReadFull(r, f.body)
	return f, err
}

func (f frame) bytes() []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(f.body)))
	b = binary.BigEndian.AppendUint32(b, f.stream)
	return append(append(b, f.kind, 0), f.body...)
}
