package qmp_test

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp"
	"github.com/vmshim/vmshim/pkg/hypervisor/qemu/qmp/qmptest"
)

func connect(t *testing.T, onEvent func(qmp.Event), script ...qmptest.Step) *qmp.Client {
	t.Helper()
	c, err := qmp.Connect(t.Context(), qmptest.Serve(t, append([]qmptest.Step{qmptest.Hello()}, script...)...), onEvent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestExecute(t *testing.T) {
	c := connect(t, nil,
		qmptest.Expect("query-status"),
		qmptest.Return(map[string]any{"status": "running"}),
		qmptest.Expect("device_add", `{"driver":"virtio-blk-pci"}`),
		qmptest.Fail("GenericError", "Bus 'pcie.0' does not support\nhotplugging"),
		qmptest.Expect("x-none"),
		qmptest.Fail("CommandNotFound", "no such command"),
	)
	if got := c.Version().String(); got != "7.2.22" {
		t.Errorf("version %s", got)
	}
	var status struct{ Status string }
	if err := c.Execute(t.Context(), "query-status", nil, &status); err != nil || status.Status != "running" {
		t.Errorf("status %q, %v", status.Status, err)
	}
	err := c.Execute(t.Context(), "device_add", map[string]string{"driver": "virtio-blk-pci"}, nil)
	var refusal *qmp.Error
	if !errors.As(err, &refusal) || refusal.Class != "GenericError" {
		t.Errorf("error %v", err)
	}
	if want := `qmp device_add: GenericError: "Bus 'pcie.0' does not support\nhotplugging"`; err.Error() != want {
		t.Errorf("got %s\nwant %s", err, want)
	}
	if err := c.Execute(t.Context(), "x-none", nil, nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("error %v is not not-implemented", err)
	}
}

// Replies find their commands although they come in another order, with
// events in between, and one whose caller has gone.
func TestConcurrentCommands(t *testing.T) {
	second := make(chan struct{})
	c := connect(t, nil,
		qmptest.Expect("first"),
		qmptest.Do(func() { close(second) }),
		qmptest.Expect("second"),
		qmptest.Event("RESUME", nil),
		qmptest.Return("2"),
		qmptest.Raw(`{"return": {}, "id": 99}`+"\n"),
		qmptest.Raw(`{"return": "1", "id": 2}`+"\n"), // the first after negotiation
	)
	var wg sync.WaitGroup
	run := func(command, want string) {
		var got string
		if err := c.Execute(t.Context(), command, nil, &got); err != nil || got != want {
			t.Errorf("%s: %q, %v", command, got, err)
		}
	}
	wg.Go(func() { run("first", "1") })
	wg.Go(func() { <-second; run("second", "2") })
	wg.Wait()
}

func TestEventsInOrder(t *testing.T) {
	events := make(chan qmp.Event, 2)
	connect(t, func(e qmp.Event) { events <- e },
		qmptest.Event("SHUTDOWN", map[string]any{"guest": true, "reason": "guest-reset"}),
		qmptest.Event("STOP", nil),
	)
	got := []qmp.Event{<-events, <-events}
	at := time.Unix(1700000000, 5000)
	want := []qmp.Event{
		{Name: "SHUTDOWN", Data: []byte(`{"guest":true,"reason":"guest-reset"}`), Time: at},
		{Name: "STOP", Time: at},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestGetFD(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := connect(t, nil,
		qmptest.Expect("getfd", `{"fdname":"tap0"}`),
		qmptest.TakeFile(func(f *os.File) {
			_, _ = io.WriteString(f, "through")
			f.Close()
		}),
		qmptest.Return(nil),
	)
	if err := c.GetFD(t.Context(), "tap0", w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if got, _ := io.ReadAll(r); string(got) != "through" {
		t.Errorf("read %q", got)
	}
}

func TestConnectRefusesGarbage(t *testing.T) {
	tests := []struct {
		name   string
		script []qmptest.Step
		want   string
	}{
		{"closed", []qmptest.Step{qmptest.Close()}, "EOF"},
		{"no json", []qmptest.Step{qmptest.Raw("hello\n")}, `line "hello"`},
		{"event first", []qmptest.Step{qmptest.Event("STOP", nil)}, "first message"},
		{"two kinds", []qmptest.Step{qmptest.Raw(`{"QMP":{},"return":{}}` + "\n")}, "not a greeting"},
		{"endless line", []qmptest.Step{qmptest.Raw(strings.Repeat(" ", 1<<20)), qmptest.Close()}, "too long"},
		{"no negotiation", []qmptest.Step{qmptest.Greet(8, 0, 0), qmptest.Expect("qmp_capabilities"), qmptest.Close()}, "qmp qmp_capabilities: connection ended: EOF"},
		{"negotiation refused", []qmptest.Step{qmptest.Greet(8, 0, 0), qmptest.Expect("qmp_capabilities"), qmptest.Fail("GenericError", "no")}, "GenericError"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			near, far := qmptest.Pair(t)
			played := make(chan struct{})
			go func() { _ = qmptest.Play(far, tt.script...); close(played) }()
			c, err := qmp.Connect(t.Context(), near, nil)
			if err == nil {
				c.Close()
				t.Fatal("connected")
			}
			<-played
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q lacks %q", err, tt.want)
			}
		})
	}
}

func TestContextEndsWaits(t *testing.T) {
	gone := errors.New("machine gone")
	soon := func() context.Context {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(10*time.Millisecond, func() { cancel(gone) })
		return ctx
	}
	t.Run("greeting", func(t *testing.T) {
		if _, err := qmp.Connect(soon(), qmptest.Serve(t), nil); !errors.Is(err, gone) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("reply", func(t *testing.T) {
		c := connect(t, nil, qmptest.Expect("stop"), qmptest.Expect("cont"), qmptest.Return(nil))
		if err := c.Execute(soon(), "stop", nil, nil); !errors.Is(err, gone) {
			t.Errorf("error %v", err)
		}
		if err := c.Execute(t.Context(), "cont", nil, nil); err != nil {
			t.Errorf("a command given up broke the next: %v", err)
		}
	})
	t.Run("write", func(t *testing.T) {
		blocked := make(chan struct{})
		c := connect(t, nil, qmptest.Wait(blocked), qmptest.Close())
		err := c.Execute(soon(), "long", strings.Repeat("x", 8<<20), nil)
		if !errors.Is(err, gone) {
			t.Errorf("error %v", err)
		}
		close(blocked)
		if err := c.Execute(t.Context(), "next", nil, nil); !errdefs.IsUnavailable(err) {
			t.Errorf("half a line went out, and the connection lives: %v", err)
		}
	})
}

// The end of QEMU ends every wait, and later commands fail at once.
func TestPeerEnds(t *testing.T) {
	sent := make(chan struct{})
	c := connect(t, nil, qmptest.Expect("a"), qmptest.Do(func() { close(sent) }), qmptest.Expect("b"), qmptest.Close())
	var wg sync.WaitGroup
	run := func(command string) {
		if err := c.Execute(t.Context(), command, nil, nil); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", command, err)
		}
	}
	wg.Go(func() { run("a") })
	wg.Go(func() { <-sent; run("b") })
	wg.Wait()
	<-c.Done()
	if !errors.Is(c.Err(), io.EOF) {
		t.Errorf("end: %v", c.Err())
	}
	if err := c.Execute(t.Context(), "c", nil, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("after the end: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// A command that comes too late does not keep what QEMU said last from being read.
func TestLastEvents(t *testing.T) {
	near, far := qmptest.Pair(t)
	played := make(chan error, 1)
	go func() {
		played <- qmptest.Play(far, qmptest.Hello(), qmptest.Event("STOP", nil), qmptest.Event("SHUTDOWN", nil), qmptest.Close())
	}()
	var events []string
	release := make(chan struct{})
	c, err := qmp.Connect(t.Context(), near, func(e qmp.Event) {
		<-release
		events = append(events, e.Name)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-played; err != nil {
		t.Error(err)
	}
	if err := c.Execute(t.Context(), "late", nil, nil); !errors.Is(err, syscall.EPIPE) || !errdefs.IsUnavailable(err) {
		t.Errorf("late: %v", err)
	}
	close(release)
	<-c.Done()
	if want := []string{"STOP", "SHUTDOWN"}; !slices.Equal(events, want) || !errors.Is(c.Err(), io.EOF) {
		t.Errorf("events %q, then %v", events, c.Err())
	}
	if err := c.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}
