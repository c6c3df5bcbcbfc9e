package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
)

// ttrpc puts a header of ten bytes before each message: the length (32 bits),
// the stream (32 bits), the type and flags (8 bits each), all big endian.
const (
	frameHeader   = 10
	frameResponse = 2
	maxMessage    = 4 << 20 // ttrpc's limit, both ways
)

var errProtocol = errors.New("guest does not speak the protocol")

type frame struct {
	length, stream uint32
	kind           byte
}

// frames finds the headers in a stream of bytes.
type frames struct {
	header [frameHeader]byte
	have   int    // bytes of the header seen
	left   uint32 // bytes of the message still to come
}

// feed walks over the next bytes and calls each for every header in them.
func (f *frames) feed(b []byte, each func(frame) error) error {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(uint64(len(b)), uint64(f.left))
			f.left -= uint32(n)
			b = b[n:]
			continue
		}
		n := copy(f.header[f.have:], b)
		f.have += n
		b = b[n:]
		if f.have < frameHeader {
			return nil
		}
		f.have = 0
		h := frame{
			length: binary.BigEndian.Uint32(f.header[:]),
			stream: binary.BigEndian.Uint32(f.header[4:]),
			kind:   f.header[8],
		}
		f.left = h.length
		if err := each(h); err != nil {
			return err
		}
	}
	return nil
}

// answers checks that the guest answers only what it was asked, each request
// once, and in messages of a bounded size. ttrpc itself is lenient: it skips
// an oversized message, however long that takes, logs every answer that it
// does not know, and stalls on one that comes twice.
type answers struct {
	out, in frames // each for one goroutine

	mu   sync.Mutex
	open map[uint32]struct{} // streams asked on and not answered; guarded by mu
}

func newAnswers() *answers { return &answers{open: map[uint32]struct{}{}} }

// asked takes what is about to be sent.
func (a *answers) asked(b []byte) {
	_ = a.out.feed(b, func(h frame) error { // never fails: we made these
		a.mu.Lock()
		defer a.mu.Unlock()
		a.open[h.stream] = struct{}{}
		return nil
	})
}

// answered checks what was received.
func (a *answers) answered(b []byte) error {
	return a.in.feed(b, func(h frame) error {
		if h.kind != frameResponse {
			return fmt.Errorf("%w: message of type %d", errProtocol, h.kind)
		}
		if h.length > maxMessage {
			return fmt.Errorf("%w: message of %d bytes, at most %d", errProtocol, h.length, maxMessage)
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if _, ok := a.open[h.stream]; !ok {
			return fmt.Errorf("%w: answer on stream %d, where nothing was asked", errProtocol, h.stream)
		}
		delete(a.open, h.stream)
		return nil
	})
}
