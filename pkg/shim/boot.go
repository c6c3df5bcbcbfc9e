package shim

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// This file holds everything in which the generations of containerd differ:
//
//	                       start: stdin        start: stdout    task API
//	1.6, 1.7, 2.0 to 2.2   options (Any) or "" bare address     2
//	2.3 and later          BootstrapParams     BootstrapResult  3
//
// All of them call the binary with the same arguments, in the bundle's
// directory, and join stdout and stderr of start. 1.7 does not trim what it
// reads and refuses an answer of version 3. 1.6 finds a running shim again by
// the file "address" in the bundle, which only the shim writes; 2.3 keeps the
// answer of start itself.

const (
	actionStart   = "start"
	actionDelete  = "delete"
	actionServe   = ""
	actionInfo    = "-info"
	actionVersion = "-version"

	// maxInput bounds what is read from containerd's stdin.
	maxInput = 10 << 20

	// taskVersion is the newest version of the task API that is served.
	taskVersion = 3

	defaultSocketDir = "/run/containerd/s"
	addressFile      = "address"
)

// A command is one call of the binary.
type command struct {
	action    string
	namespace string
	id        string
	address   string // of the daemon's socket (grpc)
	ttrpc     string // of the daemon's socket for events
	bundle    string // absolute
	debug     bool
	began     time.Time
	options   *anypb.Any // of the runtime; nil: none
}

func parseCommand(args []string) (command, error) {
	var (
		c             = command{began: time.Now()}
		info, version bool
		unused        string
	)
	fs := flag.NewFlagSet(Name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&c.namespace, "namespace", "", "")
	fs.StringVar(&c.id, "id", "", "")
	fs.StringVar(&c.address, "address", "", "")
	fs.StringVar(&c.bundle, "bundle", "", "")
	fs.StringVar(&unused, "publish-binary", "", "")
	fs.StringVar(&unused, "socket", "", "")
	fs.StringVar(&unused, "debug-socket", "", "")
	fs.BoolVar(&c.debug, "debug", false, "")
	fs.BoolVar(&info, "info", false, "")
	fs.BoolVar(&version, "version", false, "")
	fs.BoolVar(&version, "v", false, "")
	if err := fs.Parse(args); err != nil {
		return c, fmt.Errorf("parse arguments: %w", err)
	}
	switch {
	case version:
		c.action = actionVersion
		return c, nil
	case info:
		c.action = actionInfo
		return c, nil
	}
	c.action = fs.Arg(0)
	c.ttrpc = os.Getenv("TTRPC_ADDRESS")
	if c.namespace == "" || c.id == "" {
		return c, errors.New("this program is started by containerd: namespace and id are needed")
	}
	var err error
	c.bundle, err = filepath.Abs(c.bundle) // empty: the working directory
	return c, err
}

// bootstrap reads containerd's stdin. The parameters are nil for a daemon that
// does not know BootstrapParams: their wire format cannot be told from that of
// the options (Any), so what was read must name this very task.
func (c command) bootstrap(stdin io.Reader) (*bootapi.BootstrapParams, *anypb.Any, error) {
	input, err := io.ReadAll(io.LimitReader(stdin, maxInput))
	if err != nil {
		return nil, nil, fmt.Errorf("read stdin: %w", err)
	}
	var params bootapi.BootstrapParams
	known := proto.Unmarshal(input, &params) == nil
	if !known || params.GetInstanceID() != c.id || params.GetNamespace() != c.namespace {
		return nil, oldOptions(input), nil
	}
	for _, e := range params.GetExtensions() {
		if isOptions(e.GetValue()) {
			return &params, e.GetValue(), nil
		}
	}
	return &params, nil, nil
}

// oldOptions are those that are the whole input; nil: it is something else.
func oldOptions(input []byte) *anypb.Any {
	var options anypb.Any
	if err := proto.Unmarshal(input, &options); err != nil || !isOptions(&options) {
		return nil
	}
	return &options
}

// start runs or finds the daemon of the task's sandbox and answers with its address.
func (c command) start(ctx context.Context, stdin io.Reader, stdout io.Writer) error {
	params, options, err := c.bootstrap(stdin)
	if err != nil {
		return err
	}
	c.options = options
	if params != nil {
		c.debug = c.debug || params.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG
		if c.ttrpc == "" {
			c.ttrpc = params.GetContainerdTtrpcAddress()
		}
	}
	socketDir := params.GetSocketDir()
	if socketDir == "" {
		socketDir = defaultSocketDir
	}
	address, err := c.launch(ctx, socketDir)
	if err != nil {
		return err
	}
	if err := writeAddress(c.bundle, address); err != nil {
		return err
	}
	answer := []byte(address)
	if params != nil {
		answer, err = proto.Marshal(&bootapi.BootstrapResult{
			Version:  taskVersion,
			Address:  address,
			Protocol: "ttrpc",
		})
		if err != nil {
			return fmt.Errorf("encode answer: %w", err)
		}
	}
	_, err = stdout.Write(answer)
	return err
}

func writeAddress(bundle, address string) error {
	if err := os.WriteFile(filepath.Join(bundle, addressFile), []byte(address), 0o600); err != nil {
		return fmt.Errorf("write shim address: %w", err)
	}
	return nil
}

func readAddress(bundle string) string {
	text, err := os.ReadFile(filepath.Join(bundle, addressFile))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// answerDelete says how the task ended, which nobody saw.
func answerDelete(stdout io.Writer, pid uint32) error {
	answer, err := proto.Marshal(&taskapi.DeleteResponse{
		Pid:        pid,
		ExitStatus: exitKilled,
		ExitedAt:   timestamppb.New(time.Now()),
	})
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	_, err = stdout.Write(answer)
	return err
}

// info answers with what the runtime can do. Stdin has the options, if any.
func (c command) info(stdin io.Reader, stdout io.Writer, version string) error {
	input, err := io.ReadAll(io.LimitReader(stdin, maxInput))
	if err != nil {
		return fmt.Errorf("read stdin: %w", err)
	}
	info := types.RuntimeInfo{
		Name:    Name,
		Version: &types.RuntimeVersion{Version: version},
	}
	if len(input) > 0 {
		info.Options = new(anypb.Any)
		if err := proto.Unmarshal(input, info.Options); err != nil {
			return fmt.Errorf("decode options: %w", err)
		}
	}
	if info.Features, err = featuresAny(); err != nil {
		return err
	}
	answer, err := proto.Marshal(&info)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	_, err = stdout.Write(answer)
	return err
}
