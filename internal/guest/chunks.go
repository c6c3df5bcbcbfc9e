package guest

import (
	"encoding/binary"
	"io"
	"slices"

	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

const (
	// frameSize is a chunk with its head that fills packets: the largest, because the
	// host passes a chunk on when all of it has come.
	frameSize = extension.MaxChunk
	// smallBuffer is what each output has: two packets.
	smallBuffer = 2 * maxPacket
	// maxBulkBuffers bounds the large buffers that all outputs together have.
	maxBulkBuffers = 4
)

// bulkBuffers has an element for each large buffer.
var bulkBuffers = make(chan struct{}, maxBulkBuffers)

// A chunkBuffer is chunks, one behind the other, as they are sent: what they carry is
// read to where it belongs. So they are sent in pieces that have nothing to do with
// chunks. Sent one by one each would end in a packet of a few bytes, which costs as
// much as a full one, because what a vsock takes in advance is bounded to the byte.
type chunkBuffer []byte

// resize makes it large for bulk if there are not too many, or small again. What is
// in it is lost.
func (f *chunkBuffer) resize(bulk bool) {
	switch large := len(*f) == bulkBuffer; {
	case bulk && !large:
		select {
		case bulkBuffers <- struct{}{}:
			*f = make(chunkBuffer, bulkBuffer)
		default:
		}
	case !bulk && large:
		<-bulkBuffers
		*f = make(chunkBuffer, smallBuffer)
	}
}

// room is where the bytes of the chunks belong.
func (f chunkBuffer) room() [][]byte {
	var room [][]byte
	for frame := range slices.Chunk(f, frameSize) {
		room = append(room, frame[extension.ChunkHead:])
	}
	return room
}

// send sends the first n bytes of the room. What of them was not sent it returns,
// with the error.
func (f chunkBuffer) send(w io.Writer, n int) (rest []byte, err error) {
	end := 0
	for n > 0 {
		k := min(n, frameSize-extension.ChunkHead)
		binary.BigEndian.PutUint32(f[end:], uint32(k))
		n, end = n-k, end+extension.ChunkHead+k
	}
	sent, err := w.Write(f[:end])
	if err == nil {
		return nil, nil
	}
	for frame := range slices.Chunk(f[:end], frameSize) {
		gone := max(0, min(sent, len(frame)))
		rest, sent = append(rest, frame[max(gone, extension.ChunkHead):]...), sent-gone
	}
	return rest, err
}
