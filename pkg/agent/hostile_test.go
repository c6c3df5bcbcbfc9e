package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
)

// script is a guest that reads a request and sends what reply makes of it,
// and then nothing more.
func script(tb testing.TB, reply func(agenttest.Frame) []byte) func(context.Context, uint32) (net.Conn, error) {
	tb.Helper()
	return agenttest.Serve(tb, func(_ uint32, conn net.Conn) {
		f, err := agenttest.ReadFrame(conn)
		if err != nil {
			return
		}
		if _, err := conn.Write(reply(f)); err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, conn)
	})
}

func response(f agenttest.Frame, r *ttrpc.Response) []byte {
	b, err := proto.Marshal(r)
	if err != nil {
		panic(err)
	}
	return agenttest.Frame{Stream: f.Stream, Type: agenttest.Response, Payload: b}.Bytes()
}

// Whatever a guest sends instead of an answer, its caller knows at once.
func TestHostileAnswers(t *testing.T) {
	oversized := func(f agenttest.Frame, n uint32) []byte {
		b := binary.BigEndian.AppendUint32(nil, n)
		return append(binary.BigEndian.AppendUint32(b, f.Stream), agenttest.Response, 0)
	}
	for _, tt := range []struct {
		name  string
		reply func(agenttest.Frame) []byte
		want  string
	}{
		{"text", func(agenttest.Frame) []byte { return []byte("HTTP/1.1 400 Bad Request\r\n\r\n") }, "message of type"},
		{"zeros", func(agenttest.Frame) []byte { return make([]byte, 64) }, "message of type 0"},
		{"ones", func(agenttest.Frame) []byte { return bytes.Repeat([]byte{0xff}, 64) }, "message of type 255"},
		{"request", func(f agenttest.Frame) []byte { f.Type = agenttest.Request; return f.Bytes() }, "message of type 1"},
		{"stream data", func(f agenttest.Frame) []byte { f.Type = agenttest.Data; return f.Bytes() }, "message of type 3"},
		{"stream never asked on", func(f agenttest.Frame) []byte { f.Stream += 2; f.Type = agenttest.Response; return f.Bytes() }, "nothing was asked"},
		{"stream zero", func(f agenttest.Frame) []byte { f.Stream = 0; f.Type = agenttest.Response; return f.Bytes() }, "nothing was asked"},
		{"oversized", func(f agenttest.Frame) []byte { return oversized(f, maxMessage+1) }, "at most 4194304"},
		{"of 4 GiB", func(f agenttest.Frame) []byte { return oversized(f, 1<<32-1) }, "at most 4194304"},
		{"no response", func(f agenttest.Frame) []byte {
			return agenttest.Frame{Stream: f.Stream, Type: agenttest.Response, Payload: []byte("\xff\xff\xff")}.Bytes()
		}, "does not speak the protocol"},
		{"no message", func(f agenttest.Frame) []byte { return response(f, &ttrpc.Response{Payload: []byte("\xff\xff")}) }, "does not speak the protocol"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := clientOf(t, Settings{Dial: script(t, tt.reply)})
			started := time.Now()
			err := c.Check(within(t, 10*time.Second))
			wantUnavailable(t, err, tt.want)
			if d := time.Since(started); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
			t.Log(err)
		})
	}
}

// Other calls in flight on the connection end as well.
func TestGarbageEndsAllCalls(t *testing.T) {
	dial := agenttest.Serve(t, func(_ uint32, conn net.Conn) {
		for range 5 {
			if _, err := agenttest.ReadFrame(conn); err != nil {
				return
			}
		}
		_, _ = conn.Write([]byte("garbage, and more of it"))
		_, _ = io.Copy(io.Discard, conn)
	})
	c := clientOf(t, Settings{Dial: dial})
	results, n := blockedCalls(t, c)
	for range n {
		wantUnavailable(t, <-results, "does not speak the protocol")
	}
}

func TestAnswerTwice(t *testing.T) {
	dial := agenttest.Serve(t, func(_ uint32, conn net.Conn) {
		f, err := agenttest.ReadFrame(conn)
		if err != nil {
			return
		}
		b := f.Answer(&protocol.HealthCheckResponse{Status: protocol.HealthCheckResponse_SERVING}).Bytes()
		_, _ = conn.Write(append(b, b...))
		_, _ = io.Copy(io.Discard, conn)
	})
	c := clientOf(t, Settings{Dial: dial})
	_ = c.Check(within(t, 10*time.Second)) // the first answer may be in time
	soon(t, "second call", func() {
		if err := c.Check(within(t, 5*time.Second)); err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
			t.Error(err)
		}
	})
}

// Closing says so, before, in the middle of and instead of an answer.
func TestGuestCloses(t *testing.T) {
	for n := range 12 {
		dial := agenttest.Serve(t, func(_ uint32, conn net.Conn) {
			if n == 0 {
				return
			}
			f, err := agenttest.ReadFrame(conn)
			if err != nil {
				return
			}
			_, _ = conn.Write(f.Answer(&protocol.HealthCheckResponse{Status: 1}).Bytes()[:n-1])
		})
		c := clientOf(t, Settings{Dial: dial})
		err := c.Check(within(t, 10*time.Second))
		wantUnavailable(t, err, "connection lost")
		if errors.Is(err, io.EOF) {
			t.Errorf("error %v could be taken for the end of a stream", err)
		}
	}
}

// What the guest says is quoted and bounded, and its details are dropped.
func TestHostileStatus(t *testing.T) {
	for _, tt := range []struct {
		name  string
		code  codes.Code
		text  string
		class error
	}{
		{"long", codes.Internal, strings.Repeat("x", 1<<20), errdefs.ErrInternal},
		{"control characters", codes.NotFound, "\x1b[31m\nlevel=error msg=\"forged\"", errdefs.ErrNotFound},
		{"unknown code", 4711, "x", errdefs.ErrUnknown},
		{"conflict by text", codes.FailedPrecondition, "conflict", errdefs.ErrFailedPrecondition},
		{"no text", codes.Unimplemented, "", errdefs.ErrNotImplemented},
		{"Rust's unknown method", codes.InvalidArgument, "/grpc.Health/Check does not exist", errdefs.ErrNotImplemented},
		{"another's unknown method", codes.InvalidArgument, "/grpc.Health/Version does not exist", errdefs.ErrInvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := clientOf(t, Settings{Dial: script(t, func(f agenttest.Frame) []byte {
				return response(f, &ttrpc.Response{Status: &spb.Status{
					Code: int32(tt.code), Message: tt.text,
					Details: []*anypb.Any{{TypeUrl: "x", Value: []byte(strings.Repeat("detail", 1000))}},
				}})
			})})
			err := c.Check(within(t, 10*time.Second))
			wantClass(t, err, tt.class)
			if text := err.Error(); len(text) > 4*maxGuestText+100 || strings.ContainsAny(text, "\x1b\n") || strings.Contains(text, "detail") {
				t.Errorf("got error %.1000q", text)
			}
		})
	}
}

// A guest that reads nothing blocks nobody: callers leave with their contexts,
// and the connection is closed when the write takes too long.
func TestGuestReadsNothing(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	dial := agenttest.Serve(t, func(_ uint32, _ net.Conn) { <-stop })
	c := clientOf(t, Settings{Dial: dial, WriteTimeout: time.Second})
	big := &protocol.CreateContainerRequest{ContainerId: strings.Repeat("x", 3<<20)}

	writer := make(chan error, 1)
	started := time.Now()
	go func() { writer <- c.CreateContainer(within(t, time.Minute), big) }() // fills the socket's buffers

	time.Sleep(100 * time.Millisecond)
	second := time.Now()
	wantClass(t, c.Check(within(t, 100*time.Millisecond)), context.DeadlineExceeded)
	if d := time.Since(second); d > 600*time.Millisecond {
		t.Errorf("a call behind the blocked one took %v, its context 100 ms", d)
	}
	wantUnavailable(t, <-writer, "guest took nothing for 1s")
	if d := time.Since(started); d > 5*time.Second {
		t.Errorf("the blocked call took %v, want about a second", d)
	}
}

func TestMarkDeadUnblocksAWrite(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	dial := agenttest.Serve(t, func(_ uint32, _ net.Conn) { <-stop })
	c := clientOf(t, Settings{Dial: dial, WriteTimeout: time.Hour})
	writer := make(chan error, 1)
	go func() {
		writer <- c.CreateContainer(within(t, time.Minute), &protocol.CreateContainerRequest{ContainerId: strings.Repeat("x", 3<<20)})
	}()
	time.Sleep(50 * time.Millisecond)
	soon(t, "MarkDead", func() { c.MarkDead(errCause) })
	wantClass(t, <-writer, errCause)
}

// A request that is too large is refused here, and harms nothing.
func TestOversizedRequest(t *testing.T) {
	peer := agenttest.Start(t, agenttest.Options{})
	c := newClient(t, peer)
	ctx := within(t, 10*time.Second)
	wantClass(t, c.SetIPTables(ctx, false, make([]byte, maxMessage)), errdefs.ErrInvalidArgument)
	if err := c.Check(ctx); err != nil {
		t.Error(err)
	}
	answer := &protocol.Metrics{Metrics: strings.Repeat("x", maxMessage-1000)}
	peer.Handle("GetMetrics", func(context.Context, proto.Message) (proto.Message, error) { return answer, nil })
	if text, err := c.Metrics(ctx); len(text) != len(answer.Metrics) || err != nil {
		t.Errorf("got %d bytes, %v of an answer just below the limit", len(text), err)
	}
}

// FuzzAnswers: whatever a guest sends, a call returns.
func FuzzAnswers(f *testing.F) {
	asked := agenttest.Frame{Stream: 1}
	f.Add([]byte{})
	f.Add(asked.Answer(&protocol.HealthCheckResponse{Status: 1}).Bytes())
	f.Add(append(asked.Answer(&protocol.HealthCheckResponse{}).Bytes(), asked.Answer(empty).Bytes()...))
	f.Add(response(asked, &ttrpc.Response{Status: &spb.Status{Code: 5, Message: "gone"}}))
	f.Add(agenttest.Frame{Stream: 1, Type: agenttest.Response, Payload: []byte{0x12, 0x7f}}.Bytes())
	f.Add(agenttest.Frame{Stream: 3, Type: agenttest.Response}.Bytes())
	f.Add([]byte("\xff\xff\xff\xff\x00\x00\x00\x01\x02\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dial := agenttest.Serve(t, func(_ uint32, conn net.Conn) {
			if _, err := agenttest.ReadFrame(conn); err == nil {
				_, _ = conn.Write(b)
			}
		})
		c := New(Settings{Dial: dial})
		_ = c.Check(t.Context()) // bounded by the close behind the bytes
		if err := c.Disconnect(); err != nil {
			t.Error(err)
		}
	})
}

// FuzzFrames: headers are found wherever the bytes are cut.
func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x01\x02\x00ab\x00\x00\x00\x00\x00\x00\x00\x03\x01\x00"), 3)
	f.Add([]byte("\xff\xff\xff\xff\x00\x00\x00\x01\x02\x00"), 1)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		collect := func(step int) (got []frame) {
			var s frames
			for rest := b; len(rest) > 0; {
				n := min(step, len(rest))
				_ = s.feed(rest[:n], func(h frame) error { got = append(got, h); return nil })
				rest = rest[n:]
			}
			return got
		}
		step = max(1, step%100)
		if whole, cut := collect(len(b)+1), collect(step); fmt.Sprint(whole) != fmt.Sprint(cut) {
			t.Errorf("got %v whole, %v in steps of %d", whole, cut, step)
		}
	})
}
