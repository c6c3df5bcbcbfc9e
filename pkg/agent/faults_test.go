package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/vmshim/vmshim/pkg/agent/agenttest"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/agent/protocol/extension"
)

// faultOperations are all operations that call the guest.
func faultOperations(tb testing.TB) []operation {
	tb.Helper()
	file := filepath.Join(tb.TempDir(), "f")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		tb.Fatal(err)
	}
	return append(slices.Clone(operations), operation{
		name: "CopyFile", call: func(ctx context.Context, c *Client) (any, error) { return nothing(c.CopyFile(ctx, file, "/f")) },
		method: "CopyFile",
	}, operation{
		name: "StartSandbox", call: func(ctx context.Context, c *Client) (any, error) {
			return nothing(c.StartSandbox(ctx, Sandbox{Request: &protocol.CreateSandboxRequest{}}))
		},
		method: "CreateSandbox",
	}, operation{
		name: "Streams", call: func(ctx context.Context, c *Client) (any, error) {
			_, err := c.Streams(ctx, "c", "", StreamSet{Stdout: true})
			return nil, err
		},
		method: "GetGuestDetails",
	})
}

// eventful are the methods that answer when something happens.
var eventful = []string{"WaitProcess", "GetOOMEvent", "ReadStdout", "ReadStderr", "WriteStdin"}

// faultyGuest is asked for op and hands the request to fault, which returns
// whether the guest goes on. What the operation asks before is answered.
func faultyGuest(tb testing.TB, op operation, fault func(net.Conn, agenttest.Frame) bool) func(context.Context, uint32) (net.Conn, error) {
	tb.Helper()
	return agenttest.Serve(tb, func(_ uint32, conn net.Conn) {
		for {
			f, err := agenttest.ReadFrame(conn)
			if err != nil {
				return
			}
			method, _, err := f.Asked()
			if err != nil {
				return
			}
			if method == op.method {
				if !fault(conn, f) {
					return
				}
				continue
			}
			var answer proto.Message = empty
			switch method {
			case "Check":
				answer = &protocol.HealthCheckResponse{Status: protocol.HealthCheckResponse_SERVING}
			case "GetGuestDetails":
				answer = &protocol.GuestDetailsResponse{AgentDetails: &protocol.AgentDetails{
					ExtraFeatures: []string{extension.FeatureExtension, extension.FeatureStreams},
				}}
			}
			if _, err := conn.Write(f.Answer(answer).Bytes()); err != nil {
				return
			}
		}
	})
}

// bounded fails the test when f does not return long before a caller would
// give the guest up.
func bounded(tb testing.TB, what string, f func() error) (err error) {
	tb.Helper()
	started := time.Now()
	soon(tb, what, func() { err = f() })
	if d := time.Since(started); d > 5*time.Second {
		tb.Errorf("%s took %v", what, d)
	}
	return err
}

// What can happen to a guest while it is asked, for everything it can be asked:
// the call ends, with an error that says whether to try again, and when the
// guest is known to be dead, later ones end at once.
func TestFaults(t *testing.T) {
	silent := func(net.Conn, agenttest.Frame) bool { return true }
	for _, op := range faultOperations(t) {
		call := func(ctx context.Context, c *Client) func() error {
			return func() error { _, err := op.call(ctx, c); return err }
		}
		t.Run(op.name, func(t *testing.T) {
			t.Run("cut", func(t *testing.T) {
				for _, part := range []int{0, 5, 10, 12} { // of the answer
					c := clientOf(t, Settings{Dial: faultyGuest(t, op, func(conn net.Conn, f agenttest.Frame) bool {
						b := agenttest.Frame{Stream: f.Stream, Type: agenttest.Response, Payload: make([]byte, 100)}.Bytes()
						_, _ = conn.Write(b[:part])
						return false
					})})
					err := bounded(t, "call", call(within(t, time.Minute), c))
					if op.name == "StopSandbox" { // that is how a guest powers off
						if err != nil {
							t.Error(err)
						}
						continue
					}
					wantUnavailable(t, err, "connection lost")
					if errors.Is(err, io.EOF) {
						t.Errorf("error %v could be taken for the end of a stream", err)
					}
				}
			})
			t.Run("stopped", func(t *testing.T) {
				asked := make(chan struct{}, 10)
				c := clientOf(t, Settings{Dial: faultyGuest(t, op, func(net.Conn, agenttest.Frame) bool { asked <- struct{}{}; return true })})
				ctx, cancel := context.WithCancel(t.Context())
				go func() { <-asked; cancel() }()
				wantClass(t, bounded(t, "call", call(ctx, c)), context.Canceled)
			})
			t.Run("stopped, without a deadline", func(t *testing.T) {
				if slices.Contains(eventful, op.method) {
					return
				}
				c := clientOf(t, Settings{Dial: faultyGuest(t, op, silent), RequestTimeout: 50 * time.Millisecond})
				wantClass(t, bounded(t, "call", call(t.Context(), c)), context.DeadlineExceeded)
			})
			t.Run("dead", func(t *testing.T) {
				asked := make(chan struct{}, 10)
				c := clientOf(t, Settings{Dial: faultyGuest(t, op, func(net.Conn, agenttest.Frame) bool { asked <- struct{}{}; return true })})
				go func() { <-asked; c.MarkDead(errCause) }()
				err := bounded(t, "call", call(within(t, time.Minute), c))
				wantUnavailable(t, err, "guest is gone")
				wantClass(t, err, errCause)
				err = bounded(t, "later call", call(t.Context(), c))
				wantUnavailable(t, err, "guest is gone")
				wantClass(t, err, errCause)
			})
			t.Run("late", func(t *testing.T) {
				pending := make(chan func(), 10)
				dials := 0
				dial := faultyGuest(t, op, func(conn net.Conn, f agenttest.Frame) bool {
					pending <- func() { _, _ = conn.Write(f.Answer(empty).Bytes()) }
					return true
				})
				c := clientOf(t, Settings{Dial: func(ctx context.Context, port uint32) (net.Conn, error) { dials++; return dial(ctx, port) }})
				ctx, cancel := context.WithCancel(t.Context())
				answers := make(chan func(), 1)
				go func() { answers <- <-pending; cancel() }()
				wantClass(t, bounded(t, "call", call(ctx, c)), context.Canceled)
				(<-answers)()
				if op.method == "Check" {
					return
				}
				if err := bounded(t, "call behind the late answer", func() error { return c.Check(within(t, time.Minute)) }); err != nil {
					t.Error(err)
				}
				if dials != 1 {
					t.Errorf("%d connections: a late answer is no reason for another", dials)
				}
			})
		})
	}
}

// However much a guest sends, the host keeps little of it.
func TestHostileMemory(t *testing.T) {
	endless := func(conn net.Conn, b []byte) {
		for {
			if _, err := conn.Write(b); err != nil {
				return
			}
		}
	}
	chunk := make([]byte, 1<<20)
	for _, tt := range []struct {
		name string
		send func(net.Conn, agenttest.Frame)
	}{
		{"a message of 4 GiB", func(conn net.Conn, f agenttest.Frame) {
			b := agenttest.Frame{Stream: f.Stream, Type: agenttest.Response}.Bytes()
			copy(b, "\xff\xff\xff\xff")
			_, _ = conn.Write(b)
			endless(conn, chunk)
		}},
		{"headers for ever", func(conn net.Conn, f agenttest.Frame) {
			b := agenttest.Frame{Stream: f.Stream, Type: agenttest.Response}.Bytes()
			endless(conn, slices.Repeat(b, 1000))
		}},
		{"a message that holds one repeated field", func(conn net.Conn, f agenttest.Frame) {
			// Two bytes on the wire for each empty entry of AgentDetails.storage_handlers.
			details := slices.Repeat([]byte{0x22, 0}, maxMessage/2-100)
			answer := &protocol.GuestDetailsResponse{AgentDetails: &protocol.AgentDetails{}}
			answer.AgentDetails.ProtoReflect().SetUnknown(details)
			_, _ = conn.Write(f.Answer(answer).Bytes())
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := clientOf(t, Settings{Dial: agenttest.Serve(t, func(_ uint32, conn net.Conn) {
				if f, err := agenttest.ReadFrame(conn); err == nil {
					tt.send(conn, f)
				}
			})})
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := c.GuestDetails(within(t, 30*time.Second))
			runtime.ReadMemStats(&after)
			t.Logf("%v, %d KiB allocated", err, (after.TotalAlloc-before.TotalAlloc)>>10)
			// An answer of 4 MiB is read once and decoded into at most sixteen times that.
			if got := after.TotalAlloc - before.TotalAlloc; got > 256<<20 {
				t.Errorf("%d MiB allocated", got>>20)
			}
		})
	}
}

// FuzzMessages: whatever message the guest answers an operation with, the call
// returns, and what it returns can be used.
func FuzzMessages(f *testing.F) {
	for i, op := range operations {
		b := []byte{}
		if op.answer != nil {
			b, _ = proto.Marshal(op.answer)
		}
		f.Add(uint8(i), b)
		f.Add(uint8(i), []byte("\x0a\x02\x0a\x00\x12\x00\x1a\x00"))
	}
	f.Fuzz(func(t *testing.T, i uint8, payload []byte) {
		op := operations[int(i)%len(operations)]
		c := New(Settings{Dial: faultyGuest(t, op, func(conn net.Conn, f agenttest.Frame) bool {
			b, err := proto.Marshal(&ttrpc.Response{Payload: payload})
			if err != nil {
				return false
			}
			_, _ = conn.Write(agenttest.Frame{Stream: f.Stream, Type: agenttest.Response, Payload: b}.Bytes())
			return false
		})})
		started := time.Now()
		_, err := op.call(t.Context(), c)
		if d := time.Since(started); d > 5*time.Second {
			t.Errorf("%s took %v", op.name, d)
		}
		if err != nil && errors.Is(err, errdefs.ErrUnknown) {
			t.Errorf("%s: %v has no class", op.name, err)
		}
		if err := c.Disconnect(); err != nil {
			t.Error(err)
		}
	})
}
