package agent

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxGuestText bounds what an error takes over of a text that the guest wrote.
const maxGuestText = 512

var errNoAddress = fmt.Errorf("no address: %w", errdefs.ErrFailedPrecondition)

// An Error is a call that did not succeed. It wraps the error's class, and the
// cause when the connection failed.
type Error struct {
	Method string // of the service; empty when it is not known
	Err    error
}

func (e *Error) Error() string {
	if e.Method == "" {
		return "agent: " + e.Err.Error()
	}
	return "agent: " + e.Method + ": " + e.Err.Error()
}

// Unwrap gives the class and the cause.
func (e *Error) Unwrap() error { return e.Err }

// fromStatus turns what the guest answered into an error with a class. Details
// are dropped: nothing here reads them, and the guest wrote them.
func fromStatus(req *ttrpc.Request, st *spb.Status) error {
	code, text := codes.Code(st.GetCode()), st.GetMessage()
	// ttrpc in Rust has no other way to say that it does not know a method.
	if code == codes.InvalidArgument && text == "/"+req.Service+"/"+req.Method+" does not exist" {
		code = codes.Unimplemented
	}
	// Kata's agent ends the output of a terminal with this.
	if text == "eof" && (req.Method == "ReadStdout" || req.Method == "ReadStderr") {
		return io.EOF
	}
	if text != "" {
		text = "guest: " + quote(text)
	}
	return errgrpc.ToNative(status.Error(code, text))
}

// quote makes text of the guest safe to show.
func quote(text string) string {
	return strconv.Quote(text[:min(len(text), maxGuestText)])
}

// waited is the error of a wait that ctx ended.
func waited(ctx context.Context, what string, since time.Time) error {
	return fmt.Errorf("%s for %v: %w", what, time.Since(since).Round(time.Millisecond), ctx.Err())
}
