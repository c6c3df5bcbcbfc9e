package extension

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

func TestStreamHeader(t *testing.T) {
	for _, h := range []StreamHeader{
		{Stream: Stdin, ContainerID: "c", ExecID: "e"},
		{Stream: Stderr, ContainerID: "", ExecID: ""},
		{Stream: Stdout, ContainerID: strings.Repeat("c", MaxID), ExecID: strings.Repeat("e", MaxID)},
	} {
		var b bytes.Buffer
		if err := WriteStreamHeader(&b, h); err != nil {
			t.Fatal(err)
		}
		b.WriteString("rest")
		got, err := ReadStreamHeader(iotest.OneByteReader(&b))
		if got != h || err != nil {
			t.Errorf("got %+v, %v, want %+v", got, err, h)
		}
		if b.String() != "rest" {
			t.Errorf("got %q behind the header", b.String())
		}
	}
	for _, h := range []StreamHeader{{ContainerID: strings.Repeat("c", MaxID+1)}, {ExecID: strings.Repeat("c", MaxID+1)}} {
		if err := WriteStreamHeader(io.Discard, h); !errors.Is(err, ErrMalformed) {
			t.Errorf("got %v for an id that is too long", err)
		}
	}
}

func TestMalformedHeader(t *testing.T) {
	for _, tt := range []struct {
		name, bytes string
		want        error
	}{
		{"nothing", "", io.EOF},
		{"short", "vms", io.ErrUnexpectedEOF},
		{"magic", "vms2\x00\x00\x00\x00\x00", ErrMalformed},
		{"stream", "vms1\x04\x00\x00\x00\x00", ErrMalformed},
		{"id too long", "vms1\x00\x04\x01", ErrMalformed},
		{"id cut", "vms1\x00\x00\x05ab", io.ErrUnexpectedEOF},
		{"no exec id", "vms1\x00\x00\x01a", io.ErrUnexpectedEOF},
	} {
		if _, err := ReadStreamHeader(strings.NewReader(tt.bytes)); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

func TestStreamAnswer(t *testing.T) {
	var b bytes.Buffer
	if err := WriteStreamAnswer(&b, StreamTaken, strings.Repeat("x", 2*MaxMessage)); err != nil {
		t.Fatal(err)
	}
	status, text, err := ReadStreamAnswer(iotest.OneByteReader(&b))
	if status != StreamTaken || len(text) != MaxMessage || err != nil {
		t.Errorf("got %d, %d bytes, %v", status, len(text), err)
	}
	if _, _, err := ReadStreamAnswer(strings.NewReader("\x01\xff\xff")); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v for a text that is too long", err)
	}
}

func TestChunks(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), MaxChunk/4)
	for name, write := range map[string]func(io.Writer) error{
		"WriteChunk": func(w io.Writer) error { return WriteChunk(w, data) },
		"ChunkWriter": func(w io.Writer) error {
			c := ChunkWriter{W: w}
			for _, part := range [][]byte{data[:1], nil, data[1:]} {
				if n, err := c.Write(part); n != len(part) || err != nil {
					return errors.Join(err, errors.New("short"))
				}
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			if err := write(&b); err != nil {
				t.Fatal(err)
			}
			if err := WriteEnd(&b); err != nil {
				t.Fatal(err)
			}
			b.WriteString("rest")
			r := &ChunkReader{R: iotest.HalfReader(&b)}
			got, err := io.ReadAll(r)
			if !bytes.Equal(got, data) || err != nil {
				t.Errorf("got %d bytes, %v, want %d", len(got), err, len(data))
			}
			if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("got %d, %v behind the end", n, err)
			}
			if b.String() != "rest" {
				t.Errorf("got %q behind the end", b.String())
			}
		})
	}
}

func TestChunkWriterError(t *testing.T) {
	broken := errors.New("broken")
	pr, pw := io.Pipe()
	go func() {
		_, _ = io.ReadFull(pr, make([]byte, 4+MaxChunk))
		_ = pr.CloseWithError(broken)
	}()
	c := ChunkWriter{W: pw}
	if n, err := c.Write(make([]byte, 3*MaxChunk)); n != MaxChunk || !errors.Is(err, broken) {
		t.Errorf("got %d, %v", n, err)
	}
}

// A receipt is sent when it is worth a packet, and long before the sender waits.
func TestReceipt(t *testing.T) {
	var wire bytes.Buffer
	r := &Receipt{W: &wire, Worth: WorthReceipt}
	sent := 0
	for _, n := range []int{1, WorthReceipt - 2, 1, MaxChunk, 7, MaxChunk} {
		if err := r.Took(n); err != nil {
			t.Fatal(err)
		}
		sent += n
		if worth := sent >= WorthReceipt; worth != (wire.Len() == 4) {
			t.Fatalf("%d bytes of receipts for %d", wire.Len(), sent)
		}
		if wire.Len() > 0 {
			if n, err := ReadReceipt(&wire); n != sent || err != nil {
				t.Errorf("got a receipt for %d, %v, want %d", n, err, sent)
			}
			sent = 0
		}
	}
	for text, want := range map[string]error{
		"\x00\x08\x00\x09": ErrMalformed, // Window + 1
		"\x00\x08":         io.ErrUnexpectedEOF,
		"":                 io.EOF,
	} {
		if _, err := ReadReceipt(strings.NewReader(text)); !errors.Is(err, want) {
			t.Errorf("%x: got %v, want %v", text, err, want)
		}
	}
	broken := errors.New("broken")
	r.W = failing{broken}
	if err := r.Took(Window); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

type failing struct{ err error }

func (w failing) Write([]byte) (int, error) { return 0, w.err }

func TestChunkReaderErrors(t *testing.T) {
	for _, tt := range []struct {
		name, bytes string
		want        error
	}{
		{"nothing", "", io.ErrUnexpectedEOF},
		{"length cut", "\x00\x00", io.ErrUnexpectedEOF},
		{"chunk cut", "\x00\x00\x00\x02a", io.ErrUnexpectedEOF},
		{"no end", "\x00\x00\x00\x01a", io.ErrUnexpectedEOF},
		{"too long", "\x00\x04\x00\x01", ErrMalformed},
	} {
		if _, err := io.ReadAll(&ChunkReader{R: strings.NewReader(tt.bytes)}); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, err, tt.want)
		}
	}
}

// FuzzStreamHeader: what is read is what would be written.
func FuzzStreamHeader(f *testing.F) {
	f.Add([]byte("vms1\x02\x00\x01c\x00\x01e"))
	f.Add([]byte("vms1\x00\x00\x00\x00\x00"))
	f.Add([]byte("vms1\x03"))
	f.Add([]byte("vms1\x00\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		h, err := ReadStreamHeader(r)
		if err != nil {
			return
		}
		var w bytes.Buffer
		if err := WriteStreamHeader(&w, h); err != nil {
			t.Fatal(err)
		}
		if used := b[:len(b)-r.Len()]; !bytes.Equal(w.Bytes(), used) {
			t.Errorf("read %x, wrote %x", used, w.Bytes())
		}
	})
}

// FuzzStreamAnswer: a text is bounded, and read exactly.
func FuzzStreamAnswer(f *testing.F) {
	f.Add([]byte("\x00\x00\x00"))
	f.Add([]byte("\x01\x00\x04gone, and more"))
	f.Add([]byte("\x02\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		_, text, err := ReadStreamAnswer(r)
		if len(text) > MaxMessage {
			t.Errorf("got a text of %d bytes", len(text))
		}
		if used := len(b) - r.Len(); err == nil && used != 3+len(text) {
			t.Errorf("used %d bytes for a text of %d", used, len(text))
		}
	})
}

// FuzzChunkReader: only the end mark is an end; data is what was sent.
func FuzzChunkReader(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02ab\x00\x00\x00\x00"), 1)
	f.Add([]byte("\x00\x00\x00\x02ab\x00\x00\x00\x01c"), 3)
	f.Add([]byte("\xff\xff\xff\xff"), 10)
	f.Fuzz(func(t *testing.T, b []byte, size int) {
		r := bytes.NewReader(b)
		c := &ChunkReader{R: r}
		buf := make([]byte, max(1, size%1000))
		var got []byte
		for {
			n, err := c.Read(buf)
			got = append(got, buf[:n]...)
			if err == nil {
				continue
			}
			if len(got) > len(b) {
				t.Errorf("got %d bytes of %d", len(got), len(b))
			}
			if used := b[:len(b)-r.Len()]; errors.Is(err, io.EOF) && !bytes.HasSuffix(used, make([]byte, 4)) {
				t.Errorf("end after %x", used)
			}
			return
		}
	})
}

func TestReadChunk(t *testing.T) {
	var wire bytes.Buffer
	for _, data := range []string{"first", "second"} {
		if err := WriteChunk(&wire, []byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	wire.Write([]byte{0, 0, 0, 5, 'c', 'u', 't'})
	var expected []int
	// One byte at a time: a chunk is read as a whole all the same, and what is expected
	// of a read is never more than what is left of it.
	r := &ChunkReader{R: iotest.OneByteReader(&wire), Expect: func(n int) { expected = append(expected, n) }}
	for _, want := range []struct {
		data string
		err  error
	}{{"first", nil}, {"second", nil}, {"cut", io.ErrUnexpectedEOF}} {
		got, err := r.ReadChunk()
		if string(got) != want.data || !errors.Is(err, want.err) {
			t.Errorf("got %q, %v; want %q, %v", got, err, want.data, want.err)
		}
	}
	if want := []int{4, 5, 4, 3, 2, 1, 4, 6, 5, 4, 3, 2, 1, 4, 5, 4, 3, 2}; !slices.Equal(expected, want) {
		t.Errorf("told to expect %v, want %v", expected, want)
	}

	wire.Reset()
	if err := errors.Join(WriteChunk(&wire, []byte("0123456789abcdefXYZ")), WriteEnd(&wire)); err != nil {
		t.Fatal(err)
	}
	r = &ChunkReader{R: bufio.NewReaderSize(&wire, 16)} // the smallest there is
	for _, want := range []string{"0123456789abcdef", "XYZ"} {
		if got, err := r.ReadChunk(); string(got) != want || err != nil {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
	for range 2 {
		if got, err := r.ReadChunk(); len(got) != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %q, %v", got, err)
		}
	}
}

// What was read is counted with the lengths, whichever way it was read.
func TestChunkReaderCount(t *testing.T) {
	var wire bytes.Buffer
	for _, chunk := range []string{"a", "0123456789", "last"} {
		if err := WriteChunk(&wire, []byte(chunk)); err != nil {
			t.Fatal(err)
		}
	}
	c := &ChunkReader{R: &wire}
	if _, err := io.ReadFull(c, make([]byte, 1+4)); err != nil {
		t.Fatal(err)
	}
	if n := c.Count(); n != ChunkHead+1+ChunkHead+4 {
		t.Errorf("counted %d for two lengths and 5 bytes", n)
	}
	for _, want := range []int{6, ChunkHead + 4} {
		if _, err := c.ReadChunk(); err != nil {
			t.Fatal(err)
		}
		if n := c.Count(); n != want {
			t.Errorf("counted %d, want %d", n, want)
		}
	}
}
