package agenttest

import (
	"encoding/binary"
	"io"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
)

// Types of frames.
const (
	Request  = 1
	Response = 2
	Data     = 3
)

// A Frame is one message of ttrpc.
type Frame struct {
	Stream  uint32
	Type    byte
	Payload []byte
}

// ReadFrame reads one.
func ReadFrame(r io.Reader) (Frame, error) {
	var h [10]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Frame{}, err
	}
	f := Frame{Stream: binary.BigEndian.Uint32(h[4:]), Type: h[8], Payload: make([]byte, binary.BigEndian.Uint32(h[:]))}
	_, err := io.ReadFull(r, f.Payload)
	return f, err
}

// Bytes is the frame on the wire.
func (f Frame) Bytes() []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(f.Payload)))
	b = binary.BigEndian.AppendUint32(b, f.Stream)
	return append(append(b, f.Type, 0), f.Payload...)
}

// Answer is the frame that answers f with a message.
func (f Frame) Answer(m proto.Message) Frame {
	payload, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	b, err := proto.Marshal(&ttrpc.Response{Payload: payload})
	if err != nil {
		panic(err)
	}
	return Frame{Stream: f.Stream, Type: Response, Payload: b}
}

// Asked is the method and the encoded request in a frame.
func (f Frame) Asked() (method string, payload []byte, err error) {
	var req ttrpc.Request
	err = proto.Unmarshal(f.Payload, &req)
	return req.GetMethod(), req.GetPayload(), err
}
