package extension

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A stream connection starts with a header from the host and an answer from
// the guest. Then its sender (the host for stdin, the guest for the others)
// sends chunks: a length of 32 bits, big endian, and that many bytes. Length 0
// ends the stream: the receiver, having taken everything, closes the
// connection, and the sender, having seen that, closes it too. A connection
// that ends before length 0 was cut. Nothing depends on half-closed sockets,
// which not every vsock transport carries.
//
// For stdin the guest sends receipts: 32 bits, big endian, for how many bytes more
// the process took. The host never has more than Window bytes under way without
// one, so that the guest's kernel always has room for them: where it has none,
// vhost-device-vsock asks for it again and again, and each answer makes it ask. A
// process that does not read its stdin so kept a processor busy.

// The streams of a process.
const (
	Stdin  = 0
	Stdout = 1
	Stderr = 2
	// Connect is no stream of a process: the connection is carried on by Splice.
	// ContainerID is the address and port to connect to, ExecID empty.
	Connect = 3
)

// Limits of the stream protocol.
const (
	ChunkHead  = 4         // bytes of a chunk's length, before it
	MaxChunk   = 256 << 10 // bytes in one chunk
	MaxID      = 1 << 10   // bytes in a container or exec id
	MaxMessage = 512       // bytes in a refusal

	// Window is the most bytes of stdin, lengths included, without a receipt: one chunk
	// that the process takes and one that comes meanwhile. WorthReceipt are a receipt.
	Window       = 2 * (ChunkHead + MaxChunk)
	WorthReceipt = Window / 4
)

var streamMagic = [4]byte{'v', 'm', 's', '1'}

// StreamStatus is the first byte of the guest's answer.
type StreamStatus byte

// The answers.
const (
	StreamOK StreamStatus = iota
	StreamNotFound
	StreamTaken
	StreamInvalid
)

// StreamHeader says which stream a connection is to carry.
type StreamHeader struct {
	Stream      byte
	ContainerID string
	ExecID      string
}

// ErrMalformed is wrapped by errors about bytes that are not the protocol's.
var ErrMalformed = errors.New("malformed stream")

// WriteStreamHeader sends the header in one write.
func WriteStreamHeader(w io.Writer, h StreamHeader) error {
	if len(h.ContainerID) > MaxID || len(h.ExecID) > MaxID {
		return fmt.Errorf("%w: id of more than %d bytes", ErrMalformed, MaxID)
	}
	b := append(streamMagic[:len(streamMagic):len(streamMagic)], h.Stream)
	b = appendString(b, h.ContainerID)
	b = appendString(b, h.ExecID)
	_, err := w.Write(b)
	return err
}

// ReadStreamHeader reads exactly one header.
func ReadStreamHeader(r io.Reader) (StreamHeader, error) {
	var b [5]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return StreamHeader{}, err
	}
	if [4]byte(b[:4]) != streamMagic || b[4] > Connect {
		return StreamHeader{}, fmt.Errorf("%w: header %x", ErrMalformed, b)
	}
	h := StreamHeader{Stream: b[4]}
	var err error
	if h.ContainerID, err = readString(r, MaxID); err != nil {
		return StreamHeader{}, err
	}
	if h.ExecID, err = readString(r, MaxID); err != nil {
		return StreamHeader{}, err
	}
	return h, nil
}

// WriteStreamAnswer sends the guest's answer; message says why not.
func WriteStreamAnswer(w io.Writer, status StreamStatus, message string) error {
	message = message[:min(len(message), MaxMessage)]
	_, err := w.Write(appendString([]byte{byte(status)}, message))
	return err
}

// ReadStreamAnswer reads exactly one answer.
func ReadStreamAnswer(r io.Reader) (StreamStatus, string, error) {
	var b [1]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, "", err
	}
	message, err := readString(r, MaxMessage)
	return StreamStatus(b[0]), message, err
}

// WriteChunk sends data, split as needed; empty data sends nothing.
func WriteChunk(w io.Writer, data []byte) error {
	for len(data) > 0 {
		n := min(len(data), MaxChunk)
		b := make([]byte, ChunkHead, ChunkHead+n)
		binary.BigEndian.PutUint32(b, uint32(n))
		if _, err := w.Write(append(b, data[:n]...)); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// A ChunkWriter sends what is written to it as chunks, in one write to W each.
type ChunkWriter struct {
	W   io.Writer
	buf []byte
}

// Write implements io.Writer; empty data sends nothing.
func (c *ChunkWriter) Write(p []byte) (written int, err error) {
	for written < len(p) {
		n := min(len(p)-written, MaxChunk)
		c.buf = binary.BigEndian.AppendUint32(c.buf[:0], uint32(n))
		c.buf = append(c.buf, p[written:written+n]...)
		if _, err := c.W.Write(c.buf); err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

// WriteEnd ends the stream.
func WriteEnd(w io.Writer) error {
	_, err := w.Write(make([]byte, ChunkHead))
	return err
}

// A Credit is the sender's side of a window of Most bytes.
type Credit struct {
	Most int
	sent int // without a receipt
}

// Take notes n bytes as sent if there is room for them.
func (c *Credit) Take(n int) bool {
	if c.sent+n > c.Most {
		return false
	}
	c.sent += n
	return true
}

// Return makes room: a receipt for n bytes has come.
func (c *Credit) Return(n int) error {
	if n > c.sent {
		return fmt.Errorf("%w: receipt for what was not sent", ErrMalformed)
	}
	c.sent -= n
	return nil
}

// A Receipt is the receiver's side of a window.
type Receipt struct {
	W     io.Writer
	Worth int // bytes for which one is sent, less than the window by more than a chunk
	taken int
}

// Took says that n bytes more were taken, of one chunk.
func (r *Receipt) Took(n int) error {
	if r.taken += n; r.taken < r.Worth {
		return nil
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(r.taken))
	r.taken = 0
	_, err := r.W.Write(b)
	return err
}

// ReadReceipt reads how many bytes more were taken.
func ReadReceipt(r io.Reader) (int, error) {
	var b [4]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(b[:])
	if n > Window {
		return 0, fmt.Errorf("%w: receipt for %d bytes", ErrMalformed, n)
	}
	return int(n), nil
}

// A ChunkReader is the bytes of a stream. It returns io.EOF after the end mark
// and io.ErrUnexpectedEOF when the connection ends before it.
type ChunkReader struct {
	R io.Reader
	// Expect, if set, is told before ReadChunk reads how many bytes are to come, at
	// least: who can wait for all of them at once wakes up less often. Where a read
	// brings less it is told again, as no more than the rest may ever come.
	Expect func(n int)

	left  uint32
	done  bool
	count int
}

// Count is how many bytes were read since it was asked last, lengths included.
func (c *ChunkReader) Count() int {
	n := c.count
	c.count = 0
	return n
}

// Read implements io.Reader. It returns as much of a chunk as p has room for: a chunk
// was sent at once, and who passes it on in one piece wakes up its reader once.
func (c *ChunkReader) Read(p []byte) (int, error) {
	if c.done {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if c.left == 0 {
		if err := c.head(); err != nil {
			return 0, err
		}
	}
	n, err := io.ReadFull(c.R, p[:min(len(p), int(c.left))])
	c.left -= uint32(n)
	c.count += n
	return n, cut(err)
}

// ReadChunk returns what is left of a chunk, or as much as fits into R's buffer, and
// nothing of the next one. It is a part of that buffer, good until the next read. Of
// a connection that was cut it returns what had come.
func (c *ChunkReader) ReadChunk() ([]byte, error) {
	if c.done {
		return nil, io.EOF
	}
	r, ok := c.R.(*bufio.Reader)
	if !ok {
		r = bufio.NewReaderSize(c.R, MaxChunk)
		c.R = r
	}
	if c.left == 0 {
		c.expect(ChunkHead - r.Buffered())
		if err := c.head(); err != nil {
			return nil, err
		}
	}
	n := min(int(c.left), r.Size())
	var err error
	for r.Buffered() < n && err == nil {
		c.expect(n - r.Buffered())
		_, err = r.Peek(r.Buffered() + 1) // one read, as long as it may be
	}
	b, _ := r.Peek(min(n, r.Buffered()))
	_, _ = r.Discard(len(b)) // all of it is buffered
	c.left -= uint32(len(b))
	c.count += len(b)
	return b, cut(err)
}

func (c *ChunkReader) expect(n int) {
	if c.Expect != nil && n > 0 {
		c.Expect(n)
	}
}

// head reads the length of the next chunk.
func (c *ChunkReader) head() error {
	var b [ChunkHead]byte
	if _, err := io.ReadFull(c.R, b[:]); err != nil {
		return cut(err)
	}
	c.count += len(b)
	c.left = binary.BigEndian.Uint32(b[:])
	switch {
	case c.left == 0:
		c.done = true
		return io.EOF
	case c.left > MaxChunk:
		return fmt.Errorf("%w: chunk of %d bytes", ErrMalformed, c.left)
	}
	return nil
}

func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
}

func readString(r io.Reader, limit int) (string, error) {
	var b [2]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return "", cut(err)
	}
	n := int(binary.BigEndian.Uint16(b[:]))
	if n > limit {
		return "", fmt.Errorf("%w: string of %d bytes, at most %d", ErrMalformed, n, limit)
	}
	s := make([]byte, n)
	if _, err := io.ReadFull(r, s); err != nil {
		return "", cut(err)
	}
	return string(s), nil
}
