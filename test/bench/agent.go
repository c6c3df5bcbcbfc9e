package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/vmshim/vmshim/pkg/agent"
	"github.com/vmshim/vmshim/pkg/agent/protocol"
	"github.com/vmshim/vmshim/pkg/vsock"
)

// callSize is how much a host of Kata's asks for in a call (bufSize of its shim).
const callSize = 32 << 10

// connect makes a client of the container's agent beside the shim's: for what
// the shim does not pass on.
func (c *container) connect() (*agent.Client, error) {
	st, err := c.r.state(c.id)
	if err != nil {
		return nil, err
	}
	dial, _, err := vsock.Parse(st.Agent)
	if err != nil {
		return nil, err
	}
	return agent.New(agent.Settings{Dial: dial, URL: st.Agent}), nil
}

// agentUse is how many files the agent has open, and its resident memory.
func agentUse(ctx context.Context, a agent.Guest) (files int, mib float64, err error) {
	text, err := a.Metrics(ctx)
	if err != nil {
		return 0, 0, err
	}
	values := map[string]float64{}
	for line := range strings.Lines(text) {
		var name string
		var value float64
		if n, _ := fmt.Sscan(line, &name, &value); n == 2 {
			values[name] = value
		}
	}
	rss, fds := values["kata_agent_total_rss"], values["kata_agent_process_open_fds"]
	if rss == 0 || fds == 0 {
		return 0, 0, fmt.Errorf("the agent's metrics have not its memory and files in them:\n%s", text)
	}
	return int(fds), rss / (1 << 20), nil
}

// ways are those that output comes by: our extension's, and plain calls, as
// Kata's hosts make them and as ours does without the extension.
func (r *rig) ways(ctx context.Context, res *results, c *container) error {
	a, err := c.connect()
	if err != nil {
		return err
	}
	defer a.Disconnect() //nolint:errcheck // nothing is under way
	plain, err := c.calls(ctx)
	if err != nil {
		return err
	}
	defer plain.Close()
	times := map[string][]time.Duration{}
	for i := range r.runs {
		for way, open := range map[string]func(ctx context.Context, id string) (io.Reader, error){
			"stream": func(ctx context.Context, id string) (io.Reader, error) {
				s, err := a.Streams(ctx, c.id, id, agent.StreamSet{Stdout: true})
				if err != nil {
					return nil, err
				}
				return s.Stdout, nil
			},
			"call": func(ctx context.Context, id string) (io.Reader, error) {
				return callsOutput{ctx, protocol.NewAgentServiceClient(plain), c.id, id}, nil
			},
			"our-call": func(ctx context.Context, id string) (io.Reader, error) { return plainOutput{ctx, a, c.id, id}, nil },
		} {
			t, err := limited(ctx, func(ctx context.Context) (time.Duration, error) {
				return carry(ctx, a, c.id, fmt.Sprintf("%s-%d", way, i), open)
			})
			if err != nil {
				return fmt.Errorf("output by %s: %w", way, err)
			}
			times[way] = append(times[way], t)
		}
	}
	const base = "ReadStdout calls of 32 KiB, 20 MiB guest to host"
	res.add(result{Name: base, Value: rate(times["call"]), Unit: "MiB/s"})
	res.add(result{Name: "ReadStdout calls of 64 KiB, 20 MiB guest to host", Value: rate(times["our-call"]), Unit: "MiB/s", Against: base})
	res.add(result{Name: "the extension's stream, 20 MiB guest to host", Value: rate(times["stream"]), Unit: "MiB/s", Against: base, AtLeast: 5})
	return nil
}

// carry is the time from a process' first byte to its last.
func carry(ctx context.Context, a agent.Processes, containerID, execID string, open func(context.Context, string) (io.Reader, error)) (_ time.Duration, err error) {
	err = a.Exec(ctx, &protocol.ExecProcessRequest{
		ContainerId: containerID, ExecId: execID,
		Process: &protocol.Process{Args: source, Cwd: "/", User: &protocol.User{}},
	})
	if err != nil {
		return 0, err
	}
	r, err := open(ctx, execID)
	if err != nil {
		return 0, err
	}
	if c, ok := r.(io.Closer); ok {
		defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	}
	took, err := take(r)
	if err != nil {
		return 0, err
	}
	if n, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("%d bytes and %w where the output ends", n, err)
	}
	if c, ok := r.(io.Closer); ok {
		err = c.Close()
	}
	_, werr := a.WaitProcess(ctx, containerID, execID)
	a.ForgetProcess(containerID, execID)
	return took, errors.Join(err, werr)
}

// calls is a connection to the container's agent for plain calls.
func (c *container) calls(ctx context.Context) (*ttrpc.Client, error) {
	st, err := c.r.state(c.id)
	if err != nil {
		return nil, err
	}
	dial, port, err := vsock.Parse(st.Agent)
	if err != nil {
		return nil, err
	}
	conn, err := dial(ctx, port)
	if err != nil {
		return nil, err
	}
	return ttrpc.NewClient(conn), nil
}

// callsOutput reads stdout as Kata's hosts do.
type callsOutput struct {
	ctx                 context.Context //nolint:containedctx // io.Reader has none
	agent               protocol.AgentServiceService
	containerID, execID string
}

func (o callsOutput) Read(p []byte) (int, error) {
	answer, err := o.agent.ReadStdout(o.ctx, &protocol.ReadStreamRequest{
		ContainerId: o.containerID, ExecId: o.execID, Len: uint32(min(len(p), callSize)),
	})
	if err == nil && len(answer.GetData()) == 0 {
		err = io.EOF
	}
	return copy(p, answer.GetData()), err
}

// plainOutput reads stdout by plain calls of our client's.
type plainOutput struct {
	ctx                 context.Context //nolint:containedctx // io.Reader has none
	a                   agent.Processes
	containerID, execID string
}

func (o plainOutput) Read(p []byte) (int, error) {
	return o.a.ReadProcessStdout(o.ctx, o.containerID, o.execID, p)
}
